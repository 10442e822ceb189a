"""How much device memory stage 1 takes, by passes that compute no numbers.

The run's own encoders encode a batch of fake tensors on a CPU. The memory that CUDA and its
libraries take for themselves is not counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.device import default_dtype
from common.memory.meter import Meter
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.text_encoders import TextEncoders, Tokens
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.fingerprints.encoder_spec import (
    CLIP_COMPONENTS,
    LatentSettings,
    TextSettings,
)
from precompute.memory.layer_groups import host_peak
from sd3.pretrained import read_config

CPU = torch.device("cpu")
# Of T5, on the device at a time with `--offload groups`: the layer that computes, and the next.
LAYERS_AT_ONCE = 2
WEIGHTS = "weights"
Offload = Literal["none", "groups"]


@dataclass(frozen=True)
class Sizes:
    """The configurations of the encoders, which decide how much memory stage 1 takes.

    Attributes:
        clips: of CLIP-L and CLIP-G.
        t5: of T5; None without it.
        vae: of the VAE.
    """

    clips: tuple[Mapping[str, Any], ...]
    t5: Mapping[str, Any] | None
    vae: Mapping[str, Any]


@dataclass(frozen=True)
class Peak:
    """The device memory of a pass when it takes the most, in bytes.

    Attributes:
        weights: of the encoders, as far as they are on the device.
        activations: everything else.
        host: in host memory, of weights that stay there, pinned; while they move there, which is
            when most is taken.
        moving: of these, what is there twice at that moment.
    """

    weights: int
    activations: int
    host: int = 0
    moving: int = 0

    @property
    def total(self) -> int:
        """All device memory."""
        return self.weights + self.activations


def read_sizes(base: Path, *, with_t5: bool = True) -> Sizes:
    """Return the sizes of a base model's encoders, from its configurations alone.

    Args:
        base: its folder.
        with_t5: whether T5 is used.

    Raises:
        ConfigError: a configuration is missing.
    """
    return Sizes(
        tuple(read_config(base, name) for _, name in CLIP_COMPONENTS),
        read_config(base, "text_encoder_3") if with_t5 else None,
        read_config(base, "vae"),
    )


def text_peaks(sizes: Sizes, settings: TextSettings, batch: int) -> dict[Offload, Peak]:
    """Return the peak of the text pass without and with T5's layers in host memory.

    Args:
        sizes: of the encoders.
        settings: token length and number formats.
        batch: prompts that are encoded at once.
    """
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    with FakeTensorMode(), torch.random.fork_rng(devices=[]), Meter() as meter:
        dtype = getattr(torch, settings.compute_dtype)
        # Some encoders are built in the number format that their configuration names.
        said = {"dtype": dtype, "torch_dtype": None}
        configs = [CLIPTextConfig.from_dict({**config, **said}) for config in sizes.clips]
        with default_dtype(dtype):
            clips = [CLIPTextModelWithProjection(config).eval() for config in configs]
            t5 = T5EncoderModel(T5Config.from_dict({**sizes.t5, **said})) if sizes.t5 else None
        t5 = t5 and _keep_float32(t5, dtype)
        for encoder in (*clips, *([t5] if t5 else [])):
            _count(meter, encoder, WEIGHTS)
        lengths = [config.max_position_embeddings for config in configs]
        clip_ids = [torch.zeros(batch, length, dtype=torch.long) for length in lengths]
        t5_ids = None
        if t5:
            t5_ids = torch.zeros(batch, settings.max_sequence_length, dtype=torch.long)
        encoders = TextEncoders(clips, t5, None, settings, CPU)
        tokens = Tokens(clip_ids, t5_ids, [], [])
        whole = _peak(meter, lambda: encoders.encode(tokens, BatchSize(batch)))
        # Only T5 visits the device in groups of layers.
        return {"none": whole, "groups": _in_groups(whole, t5) if t5 else whole}


def _in_groups(whole: Peak, t5: Any) -> Peak:
    """Return the peak with T5's layers in host memory: the same pass, with two of them there."""
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in t5.encoder.block]
    elsewhere = sum(layers) - sum(sorted(layers)[-LAYERS_AT_ONCE:])
    # T5 is loaded whole into host memory, from where the rest of it leaves for the device.
    loaded = sum(weight.nbytes for weight in t5.parameters())
    moving = host_peak([weight.nbytes for weight in t5.encoder.block.parameters()]) - sum(layers)
    return Peak(whole.weights - elsewhere, whole.activations, loaded + moving, moving)


def image_peak(sizes: Sizes, settings: LatentSettings, batch: int) -> Peak:
    """Return the peak of the image pass.

    Args:
        sizes: of the encoders.
        settings: number formats and shapes; the largest shape counts.
        batch: images that are encoded at once.
    """
    from diffusers import AutoencoderKL

    with FakeTensorMode(), torch.random.fork_rng(devices=[]), Meter() as meter:
        with default_dtype(getattr(torch, settings.compute_dtype)):
            encoder = VaeEncoder(AutoencoderKL.from_config(dict(sizes.vae)), settings, CPU)
        _count(meter, encoder.vae, WEIGHTS)
        width, height = settings.largest_shape
        pixels = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
        return _peak(meter, lambda: encoder.encode(pixels, "-1_1", "latent", BatchSize(batch)))


def _peak(meter: Meter, encode: Callable[[], dict[str, Tensor]]) -> Peak:
    """Return the peak of encoding a batch while the output of the batch before is still there."""
    meter.reset_peak()
    output = encode()
    of_output = sum(tensor.nbytes for tensor in output.values())
    return Peak(meter.peak[WEIGHTS], meter.peak["activations"] + of_output)


def _keep_float32(model: Any, dtype: torch.dtype) -> Any:
    """Return an encoder with those weights in float32 that transformers leaves so in float16."""
    if dtype == torch.float16:
        kept = set(model._keep_in_fp32_modules or ())
        for name, module in model.named_modules():
            if kept & set(name.split(".")):
                for key, weight in module.named_parameters(recurse=False):
                    setattr(module, key, nn.Parameter(weight.detach().float()))
    return model.eval()


def _count(meter: Meter, module: Any, kind: str) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        meter.count(tensor, kind)
