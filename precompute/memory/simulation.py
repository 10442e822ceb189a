"""How much device memory stage 1 takes, by passes that compute no numbers.

The run's own encoders encode a batch of fake tensors on a CPU. The memory that CUDA and its
libraries take for themselves is not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.device import default_dtype
from common.memory.meter import Meter
from precompute.config import PrecomputeConfig
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.text_encoders import TextEncoders, Tokens
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.fingerprints.encoder_spec import (
    CLIP_COMPONENTS,
    T5_COMPONENTS,
    LatentSettings,
    TextSettings,
    latent_settings,
    text_settings,
)
from sd3.pretrained import read_config

CPU = torch.device("cpu")
# Of T5, on the device at a time with `--offload groups`: the layer that computes, and the next.
LAYERS_AT_ONCE = 2
WEIGHTS, ELSEWHERE = "weights", "in host memory"


@dataclass(frozen=True)
class Sizes:
    """The configurations of the encoders, which decide how much memory stage 1 takes.

    Attributes:
        clips: of CLIP-L and CLIP-G.
        t5: of T5.
        vae: of the VAE.
    """

    clips: tuple[Mapping[str, Any], ...]
    t5: Mapping[str, Any]
    vae: Mapping[str, Any]


@dataclass(frozen=True)
class Peak:
    """The device memory of a pass when it takes the most, in bytes.

    Attributes:
        weights: of the encoders, as far as they are on the device.
        activations: everything else.
        host: weights that stay in pinned host memory.
    """

    weights: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """All device memory."""
        return self.weights + self.activations


def read_sizes(base: Path) -> Sizes:
    """Return the sizes of a base model's encoders, from its configurations alone.

    Raises:
        ConfigError: a configuration is missing.
    """
    return Sizes(
        tuple(read_config(base, name) for _, name in CLIP_COMPONENTS),
        read_config(base, T5_COMPONENTS[1]),
        read_config(base, "vae"),
    )


def simulate(config: PrecomputeConfig, sizes: Sizes) -> dict[str, Peak]:
    """Return the peaks of a run's passes by name, `text` and `images`.

    Batches of `auto` count as one item: on a GPU they are as large as fits. So does `--offload
    auto` as `none`: see `precompute.memory.offload`.
    """
    text, images = (
        1 if given == "auto" else int(given)
        for given in (config.text_batch_size, config.vae_batch_size)
    )
    in_groups = config.offload == "groups"
    return {
        "text": text_peak(sizes, text_settings(config), text, in_groups=in_groups),
        "images": image_peak(sizes, latent_settings(config), images),
    }


def text_peak(sizes: Sizes, settings: TextSettings, batch: int, *, in_groups: bool) -> Peak:
    """Return the peak of the text pass.

    Args:
        sizes: of the encoders.
        settings: token length and number formats.
        batch: prompts that are encoded at once.
        in_groups: whether T5's layers visit the device in turn.
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
            t5 = T5EncoderModel(T5Config.from_dict({**sizes.t5, **said}))
        t5 = _keep_float32(t5, dtype)
        for encoder in (*clips, t5):
            _count(meter, encoder, WEIGHTS)
        host = visiting = 0
        if in_groups:
            layers = [
                sum(weight.nbytes for weight in layer.parameters()) for layer in t5.encoder.block
            ]
            _count(meter, t5.encoder.block, ELSEWHERE)
            host, visiting = sum(layers), sum(sorted(layers)[-LAYERS_AT_ONCE:])
        lengths = [config.max_position_embeddings for config in configs]
        clip_ids = [torch.zeros(batch, length, dtype=torch.long) for length in lengths]
        t5_ids = torch.zeros(batch, settings.max_sequence_length, dtype=torch.long)
        encoders = TextEncoders(clips, t5, None, settings, CPU)
        meter.reset_peak()
        # The first batch is encoded twice, the output of the first time still there.
        first = encoders.encode(Tokens(clip_ids, t5_ids, [], []), BatchSize(batch))
        again = encoders.encode(Tokens(clip_ids, t5_ids, [], []), BatchSize(batch))
        del first, again
        return Peak(meter.peak[WEIGHTS] + visiting, meter.peak["activations"], host)


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
        meter.reset_peak()
        first = encoder.encode(pixels, "-1_1", "latent", BatchSize(batch))
        again = encoder.encode(pixels, "-1_1", "latent", BatchSize(batch))
        del first, again
        return Peak(meter.peak[WEIGHTS], meter.peak["activations"])


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
