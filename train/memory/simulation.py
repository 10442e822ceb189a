"""A run without numbers: how much memory its tensors would take.

A step of the very networks is taken with tensors that have shapes alone, on a CPU that behaves as
CUDA where that changes what is kept. Not counted: what CUDA and its libraries take for themselves.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from common.device import default_dtype
from sd3.prompt_embeds import prompt_embeds
from sd3.quantized import quantize, replace_linear
from shards.format.specs import LatentSpec
from train import models
from train.config import TrainConfig
from train.data import Batch
from train.inputs import WEIGHT_DTYPES
from train.loss import Objective, batch_losses
from train.memory import activation_offload
from train.memory.meter import Meter
from train.optim import adamw

PARTS = ("frozen base", "ControlNet", "average", "optimiser", "gradients", "activations")


@dataclass(frozen=True)
class Sizes:
    """What of the models and the data decides how much memory training takes.

    Attributes:
        transformer: configuration of the base's.
        controlnet: configuration of the ControlNet.
        vae: configuration of the VAE if it decodes on the device, else None.
        latent: grid of the largest latents, h, w.
        clip: tokens and width of the CLIP embeddings.
        t5: the same of T5's.
        validates: whether pictures are drawn.
    """

    transformer: Mapping[str, Any]
    controlnet: Mapping[str, Any]
    vae: Mapping[str, Any] | None
    latent: tuple[int, int]
    clip: tuple[int, int]
    t5: tuple[int, int]
    validates: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device.

    Attributes:
        step: at the fullest moment of a training step, by part.
        validation: at the fullest moment of a validation; 0 without.
        host: of pinned host memory, for what is offloaded.
    """

    step: dict[str, int]
    validation: int
    host: int

    @property
    def peak(self) -> int:
        """The most that is ever taken."""
        return max(sum(self.step.values()), self.validation)


def mixed_precision(config: TrainConfig) -> str:
    """Return the precision that a run will have: accelerate's own unless it is given."""
    return config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def simulate(config: TrainConfig, sizes: Sizes) -> Estimate:
    """Take a step and a validation that compute nothing, and count.

    Args:
        config: of the run, on one device.
        sizes: of models and data.
    """
    with FakeTensorMode(), torch.random.fork_rng(devices=[]), Simulation(config, sizes) as run:
        run.step()
        step = {part: run.meter.peak.get(part, 0) for part in PARTS}
        validation = run.validation() if sizes.validates else 0
        return Estimate(step, validation, run.host)


class Simulation(ExitStack):
    """The networks of a run, without numbers, and a meter that watches them.

    Args:
        config: of the run.
        sizes: of models and data.
    """

    def __init__(self, config: TrainConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        self.precision = mixed_precision(config)
        self.dtype = WEIGHT_DTYPES[self.precision]
        self.meter = Meter()
        self.host = 0
        self.transformer = _built(SD3Transformer2DModel, sizes.transformer, self.dtype)
        self.transformer.requires_grad_(False).eval()
        if config.quantize_base == "nf4":
            replace_linear(self.transformer, _Nf4Sizes)
        elif config.quantize_base is not None:
            quantize(self.transformer, config.quantize_base, fp8_matmul=config.fp8_matmul)
        trained_dtype = torch.bfloat16 if config.bf16_weights else torch.float32
        self.controlnet = _built(SD3ControlNetModel, sizes.controlnet, trained_dtype)
        models.freeze_unused(self.controlnet)
        self.controlnet.train()
        if config.gradient_checkpointing:
            self.controlnet.enable_gradient_checkpointing()
            self.transformer.enable_gradient_checkpointing()
        self.trained = [one for one in self.controlnet.parameters() if one.requires_grad]
        for network, part in ((self.transformer, "frozen base"), (self.controlnet, "ControlNet")):
            for tensor in (*network.parameters(), *network.buffers()):
                self.meter.count(tensor, part)
        self._kept = [self._state()]
        if config.ema_decay is not None:
            self._kept += [torch.empty(one.shape) for one in self.trained]
            for tensor in self._kept[1:]:
                self.meter.count(tensor, "average")
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._has_gradient)
        if self.precision != "no":
            autocast = torch.autocast("cpu", self.dtype, cache_enabled=False)
            _use_float32_norms(self.controlnet)
            self.controlnet.forward = ConvertOutputsToFp32(autocast(self.controlnet.forward))

    def __enter__(self) -> "Simulation":
        self.enter_context(self.meter)
        return self

    def _state(self) -> Tensor:
        """Return a tensor as large as what the optimiser keeps on the device."""
        on_device = 0
        for parameter in self.trained:
            count = parameter.numel()
            size = _state_bytes(count, eight_bit=self.config.use_8bit_adam)
            if self.config.offload_optimizer and count >= adamw.VISITING_NUMBERS:
                self.host += size
            else:
                on_device += size
        state = torch.empty(on_device, dtype=torch.uint8)
        self.meter.count(state, "optimiser")
        return state

    def _has_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.meter.count(parameter.grad, "gradients")
        if self.config.fused_backward_pass:
            self._update(parameter)
            parameter.grad = None

    def _update(self, parameter: Tensor) -> None:
        """Take as much as an update does."""
        config, count = self.config, parameter.numel()
        visitor = None
        if config.offload_optimizer and count >= adamw.VISITING_NUMBERS:
            visitor = torch.empty(
                _state_bytes(count, eight_bit=config.use_8bit_adam), dtype=torch.uint8
            )
        with torch.no_grad(), adamw.exact(parameter):
            del visitor

    def step(self) -> None:
        """Take an optimiser step."""
        config = self.config
        batch = self._batch(config.train_batch_size)
        table = torch.empty(1000)
        spec = LatentSpec(16, 8, 1.0, 0.0, "mean", "-1_1", dtype="float32")
        settings = Objective(
            sigmas=table,
            timesteps=table,
            latent_spec=spec,
            conditioning_spec=spec,
            weighting_scheme=config.weighting_scheme,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            precondition_outputs=bool(config.precondition_outputs),
        )
        if config.gradient_accumulation_steps > 1:
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
                self.meter.count(parameter.grad, "gradients")
        self.meter.start_anew()
        with self._offloading():
            losses = batch_losses(batch, self.controlnet, self.transformer, settings)
        losses.mean().backward()
        del losses
        if not config.fused_backward_pass:
            for parameter in self.trained:
                if parameter.grad is not None:
                    self._update(parameter)
        for parameter in self.trained:
            parameter.grad = None

    def validation(self) -> int:
        """Return the most that drawing and decoding take."""
        config = self.config
        self.meter.start_anew()
        self.controlnet.eval()
        averages = [torch.empty_like(one) for one in self.trained] if config.ema_decay else []
        guided = config.validation_guidance_scale > 1
        batch = self._batch(config.num_validation_images * (2 if guided else 1))
        with torch.no_grad():
            embeds = prompt_embeds(batch.clip_embeds, batch.t5_embeds).to(self.dtype)
            common = {
                "hidden_states": batch.latent.to(self.dtype),
                "timestep": batch.uniform,
                "encoder_hidden_states": embeds,
                "pooled_projections": batch.pooled_embeds.to(self.dtype),
                "return_dict": False,
            }
            residuals = self.controlnet(controlnet_cond=batch.latent.to(self.dtype), **common)[0]
            residuals = [one.to(self.dtype) for one in residuals]
            self.transformer(block_controlnet_hidden_states=residuals, **common)
            del residuals, common, embeds, batch, averages
            if self.sizes.vae is not None:
                # Imported here so that training never sees a VAE.
                from diffusers import AutoencoderKL

                vae = AutoencoderKL.from_config(dict(self.sizes.vae))
                for parameter in vae.decoder.parameters():
                    self.meter.count(parameter, "decoder")
                vae.encoder = None
                vae.decode(torch.empty(1, vae.config.latent_channels, *self.sizes.latent))
        return sum(self.meter.peak.values())

    def _batch(self, count: int) -> Batch:
        sizes = self.sizes
        channels = int(sizes.transformer["in_channels"])
        latent = (count, channels, *sizes.latent)
        return Batch(
            latent=torch.empty(latent, dtype=torch.bfloat16),
            conditioning_latent=torch.empty(latent, dtype=torch.bfloat16),
            clip_embeds=torch.empty(count, *sizes.clip, dtype=torch.bfloat16),
            t5_embeds=torch.empty(count, *sizes.t5, dtype=torch.bfloat16),
            pooled_embeds=torch.empty(count, int(sizes.transformer["pooled_projection_dim"])),
            noise=torch.empty(latent),
            uniform=torch.empty(count),
            normal=torch.empty(count),
        )

    def _offloading(self) -> Any:
        """Do what `activation_offload` does, where host and device cannot be told apart."""
        if not self.config.offload_activations:
            return ExitStack()

        def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, torch.dtype]:
            weight = self.meter.kind(tensor) in ("frozen base", "ControlNet")
            if weight or tensor.nbytes < activation_offload.SMALLEST_BYTES:
                return tensor
            self.host += 1 << (tensor.nbytes - 1).bit_length()  # as pinned memory is given out
            return tensor.shape, tensor.dtype

        def unpack(packed: Tensor | tuple[torch.Size, torch.dtype]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            shape, dtype = packed
            return torch.empty(shape, dtype=dtype)

        return saved_tensors_hooks(pack, unpack)


def _use_float32_norms(network: nn.Module) -> None:
    """Have layer norms computed in float32, as CUDA's autocast does and the CPU's does not."""

    def in_float32(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].float(),)

    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(in_float32)


class _Nf4Sizes(nn.Module):
    """As large as bitsandbytes' 4 bit layer, with its scales rounded to 8 bit in turn."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.shape, self.bias = linear.weight.shape, linear.bias
        count = linear.weight.numel()
        self.register_buffer("values", torch.empty(count // 2, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(count // 64, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(-(-count // (64 * 256))))

    def forward(self, inputs: Tensor) -> Tensor:
        return _Nf4Product.apply(inputs, self)  # type: ignore[no-untyped-call,no-any-return]


class _Nf4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: _Nf4Sizes) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, inputs.new_empty(layer.shape), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.layer.shape), None


def _state_bytes(count: int, *, eight_bit: bool) -> int:
    """Return the bytes of AdamW's two moments; in 8 bit with a scale for 256 of a large weight."""
    if not eight_bit or count < 4096:
        return 8 * count
    return 2 * (count + 4 * -(-count // 256))


def _built(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a model in some precision; tensors without numbers cannot be cast in place."""
    with default_dtype(dtype):
        model = kind.from_config(dict(config))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(dtype))
    return model
