"""How much device memory drawing takes, by a batch of pictures without numbers.

The stock pipeline draws two steps with fake tensors on a CPU. The memory that CUDA and its
libraries take for themselves is not counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common.memory.meter import Meter
from infer.config import Offload, PipelineConfig
from infer.vae import save_memory
from precompute.fingerprints.encoder_spec import TextSettings
from precompute.memory import simulation as stage1
from sd3.inpainting import is_inpainting
from train.memory.stand_ins import build_network, quantize
from train.memory.streamed_base import NUM_PLACES, place_bytes, tensors_of

TEXT, CONTROLNET, TRANSFORMER, VAE = "text encoders", "ControlNet", "transformer", "VAE"
# The models that compute, by moment; with an offload other than `none` no others are there.
MOMENTS = {
    "encoding prompts": (TEXT,),
    "encoding controls": (VAE,),
    "denoising": (CONTROLNET, TRANSFORMER),
    "decoding": (VAE,),
}
PROMPTS, CONTROLS, DENOISING, DECODING = MOMENTS
ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Sizes:
    """The sizes of models and pictures that decide how much memory drawing takes.

    Attributes:
        transformer: configuration of the base's transformer.
        controlnets: configurations of the ControlNets that draw a picture together.
        vae: configuration of the VAE.
        encoders: configurations of the text encoders; None where a cache has all prompts.
        picture: width and height of the largest pictures, in pixels.
        clip_tokens: CLIP tokens.
        tokens: T5 tokens.
        batch_size: pictures drawn at a time.
    """

    transformer: Mapping[str, Any]
    controlnets: tuple[Mapping[str, Any], ...]
    vae: Mapping[str, Any]
    encoders: stage1.Sizes | None
    picture: tuple[int, int]
    clip_tokens: int
    tokens: int
    batch_size: int


@dataclass(frozen=True)
class Bytes:
    """A model's bytes.

    Attributes:
        whole: all of it.
        in_parts: what is on the device where its layers come in turn.
        loaded: in host memory, before it is quantised.
        moving: in host memory on top, while its layers move into pinned memory.
    """

    whole: int
    in_parts: int
    loaded: int
    moving: int = 0


@dataclass(frozen=True)
class Drawing:
    """What drawing takes, in bytes.

    Attributes:
        models: by name.
        activations: the most of everything else, by moment.
        picture: width and height in pixels.
        batch_size: pictures drawn at a time.
    """

    models: dict[str, Bytes]
    activations: dict[str, int]
    picture: tuple[int, int]
    batch_size: int

    def moments(self, offload: Offload) -> dict[str, dict[str, int]]:
        """Return what is on the device at each moment, by part."""
        return {
            moment: {**self._models(moment, offload), ACTIVATIONS: activations}
            for moment, activations in self.activations.items()
        }

    def peak(self, offload: Offload) -> int:
        """Return the most that is on the device at a time."""
        return max(sum(parts.values()) for parts in self.moments(offload).values())

    def host(self, offload: Offload) -> int:
        """Return the most in host memory, through which all weights are loaded."""
        models = self.models.values()
        loading = sum(model.loaded for model in models)
        if offload == "none":
            return loading
        return max(loading, sum(model.whole + model.moving for model in models))

    def _models(self, moment: str, offload: Offload) -> dict[str, int]:
        """Return the bytes of the models on the device; see `infer.placement`."""
        found: dict[str, int] = {}
        for name, model in self.models.items():
            in_parts = name == TEXT or (offload == "groups" and name != VAE)
            if offload == "none":
                found[name] = model.whole
            elif name in MOMENTS[moment]:
                found[name] = model.in_parts if in_parts else model.whole
            elif in_parts and name != TEXT:
                found[name] = model.in_parts
        return found


def simulate(config: PipelineConfig, sizes: Sizes) -> Drawing:
    """Return what drawing takes, by pictures without numbers.

    Args:
        config: settings of the run, with a number format.
        sizes: of models and pictures.
    """
    networks = _once(
        lambda: _Pipeline(config, sizes).drawing(),
        replace(sizes, encoders=None),
        (config.dtype, config.quantize_base, config.vae_tiling, config.guidance_scale > 1),
    )
    if sizes.encoders is None:
        return networks
    text = _once(
        lambda: _encode_prompts(config, sizes),
        sizes.encoders,
        (config.dtype, sizes.tokens, sizes.batch_size),
    )
    return replace(
        networks,
        models=text.models | networks.models,
        activations=text.activations | networks.activations,
    )


_done: dict[str, Drawing] = {}


def _once(simulated: Callable[[], Drawing], *about: Any) -> Drawing:
    """Return what a simulation gives, and do it once: settings are compared, most are the same."""
    key = repr(about)
    if key not in _done:
        _done[key] = simulated()
    return _done[key]


def _encode_prompts(config: PipelineConfig, sizes: Sizes) -> Drawing:
    """Return what the text encoders take."""
    assert sizes.encoders is not None
    width = None if sizes.encoders.t5 else int(sizes.transformer["joint_attention_dim"])
    settings = TextSettings(
        sizes.tokens, config.dtype, config.dtype, allow_tf32=False, width_without_t5=width
    )
    peaks = stage1.text_peaks(sizes.encoders, settings, sizes.batch_size)
    whole, in_parts = peaks["none"], peaks["groups"]
    return Drawing(
        {TEXT: Bytes(whole.weights, in_parts.weights, whole.weights, in_parts.moving)},
        {PROMPTS: whole.activations},
        sizes.picture,
        sizes.batch_size,
    )


class _Pipeline:
    """The stock pipeline without numbers."""

    def __init__(self, config: PipelineConfig, sizes: Sizes) -> None:
        from diffusers import (
            AutoencoderKL,
            SD3ControlNetModel,
            SD3Transformer2DModel,
            StableDiffusion3ControlNetInpaintingPipeline,
            StableDiffusion3ControlNetPipeline,
        )

        from sd3.controlnet.combined import together

        self.config, self.sizes = config, sizes
        self.dtype = getattr(torch, config.dtype)
        schedule = _schedule()
        with FakeTensorMode() as self.mode, torch.random.fork_rng(devices=[]):
            transformer = build_network(SD3Transformer2DModel, sizes.transformer, self.dtype)
            nets = [
                build_network(SD3ControlNetModel, saved, self.dtype) for saved in sizes.controlnets
            ]
            vae = build_network(AutoencoderKL, sizes.vae, self.dtype)
            save_memory(vae, tiling=config.vae_tiling)
            loaded = _bytes(transformer)
            if config.quantize_base is not None:
                quantize(transformer.requires_grad_(False), config.quantize_base)
            controlnet = together(nets, int(sizes.transformer["num_layers"]))
            self.inpainting = is_inpainting(sizes.controlnets[0])
            stock_class = StableDiffusion3ControlNetPipeline
            if self.inpainting:
                stock_class = StableDiffusion3ControlNetInpaintingPipeline
            self.pipeline = stock_class(
                transformer=transformer,
                scheduler=schedule,
                vae=vae,
                controlnet=controlnet,
                **dict.fromkeys(
                    f"{kind}{suffix}"
                    for kind in ("text_encoder", "tokenizer")
                    for suffix in ("", "_2", "_3")
                ),
            )
        self.models = {
            CONTROLNET: Bytes(_bytes(controlnet), sum(map(_in_parts, nets)), _bytes(controlnet)),
            TRANSFORMER: Bytes(_bytes(transformer), _in_parts(transformer), loaded),
            VAE: Bytes(_bytes(vae), _bytes(vae), _bytes(vae)),
        }

    def drawing(self) -> Drawing:
        """Return what drawing takes without text encoders."""
        return Drawing(self.models, self._draw(), self.sizes.picture, self.sizes.batch_size)

    def _draw(self) -> dict[str, int]:
        """Return the most bytes of all but the models, by moment."""
        pipeline, sizes = self.pipeline, self.sizes
        with self.mode, torch.random.fork_rng(devices=[]), Meter() as meter:
            for name in ("transformer", "controlnet", "vae"):
                for tensor in _tensors(getattr(pipeline, name)):
                    meter.count(tensor, "weights")
            pipeline.set_progress_bar_config(disable=True)
            moments = _Moments(meter)
            moments.watch(pipeline)
            width, height = sizes.picture
            controls: Any = [self._control() for _ in sizes.controlnets]
            several = len(controls) > 1
            mask = {"control_mask": self._control()[:, :1]} if self.inpainting else {}
            pipeline(
                **mask,
                **self._prompts(),
                control_image=controls if several else controls[0],
                controlnet_conditioning_scale=[1.0] * len(controls) if several else 1.0,
                width=width,
                height=height,
                num_inference_steps=2,  # in the second, outputs of the first are still there
                guidance_scale=self.config.guidance_scale,
                output_type="pt",
            )
            return moments.finish()

    def _control(self) -> Tensor:
        width, height = self.sizes.picture
        return torch.empty(self.sizes.batch_size, 3, height, width, dtype=self.dtype)

    def _prompts(self) -> dict[str, Tensor]:
        """Return embeddings of the prompts, and of the negative ones with guidance."""
        transformer = self.sizes.transformer
        count = self.sizes.batch_size
        tokens = self.sizes.clip_tokens + self.sizes.tokens
        widths = transformer["joint_attention_dim"], transformer["pooled_projection_dim"]
        arguments: dict[str, Tensor] = {}
        for prefix in ("", "negative_") if self.config.guidance_scale > 1 else ("",):
            embeds = torch.empty(count, tokens, widths[0], dtype=self.dtype)
            pooled = torch.empty(count, widths[1], dtype=self.dtype)
            arguments |= {
                f"{prefix}prompt_embeds": embeds,
                f"{prefix}pooled_prompt_embeds": pooled,
            }
        return arguments


class _Moments:
    """Notes the peak of each moment of a pipeline's call.

    Args:
        meter: counts what is there.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.peaks: dict[str, int] = {}
        self.now = CONTROLS

    def watch(self, pipeline: Any) -> None:
        """Note when a pipeline's models begin to compute."""
        self.meter.reset_peak()
        pipeline.vae._hf_hook = self  # `encode` and `decode` call its `pre_forward`
        pipeline.controlnet.register_forward_pre_hook(lambda *_: self._enter(DENOISING))

    def pre_forward(self, *_: Any) -> None:
        """Note that the VAE begins."""
        self._enter(CONTROLS if self.now == CONTROLS else DECODING)

    def finish(self) -> dict[str, int]:
        """Return the most bytes of activations, by moment."""
        self._enter(DECODING)
        return self.peaks

    def _enter(self, moment: str) -> None:
        peak = self.meter.peak.get(ACTIVATIONS, 0)
        self.peaks[self.now] = max(self.peaks.get(self.now, 0), peak)
        self.meter.reset_peak()
        self.now = moment


def _schedule() -> Any:
    """Return a noise schedule whose steps need no numbers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Schedule(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, count: int, device: Any = None, **_: Any) -> None:
            self.timesteps = torch.empty(count)

        def step(self, output: Tensor, _: Any, sample: Tensor, **__: Any) -> tuple[Tensor]:
            return ((sample.float() + output).to(output.dtype),)

    return Schedule()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model))


def _in_parts(network: Any) -> int:
    """Return the bytes of an SD3 network on the device where all its blocks are streamed."""
    blocks = [tensors_of(block) for block in network.transformer_blocks]
    of_blocks = sum(tensor.nbytes for block in blocks for tensor in block)
    return _bytes(network) - of_blocks + NUM_PLACES * max(map(place_bytes, blocks))
