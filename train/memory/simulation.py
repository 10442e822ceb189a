"""How much memory a run's tensors take, by a step that computes no numbers.

The run's own networks take a step with fake tensors, on a CPU that imitates CUDA wherever that
changes what is kept. The memory that CUDA and its libraries take for themselves is not counted.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.memory.meter import Meter
from common.memory.need import Need
from sd3.controlnet.kinds import kind_of
from sd3.controlnet.pooled_projection import DEFAULT_POOLED_PROJECTION
from sd3.prompt_embeds import prompt_embeds
from shards.format.specs import LatentSpec
from train.config import TrainConfig
from train.data import Batch
from train.loss import Objective, batch_losses, control_of, predict, run_networks
from train.memory.cast_weights import cast_weights_at_use
from train.memory.stand_ins import (
    DroppedActivations,
    build_network,
    network_bytes,
    quantize,
    stream_blocks,
)
from train.models import (
    WEIGHT_DTYPES,
    mixed_precision,
    prepare_base,
    prepare_controlnet,
    trained_parameters,
)
from train.optim.ema import Ema
from train.optim.named import SCHEDULE_FREE
from train.optim.offloaded_state import is_offloaded
from train.optim.state_bytes import state_bytes
from train.optim.stochastic_rounding import in_float32

PARTS = ("frozen base", "ControlNet", "average", "optimiser", "gradients", "activations")


@dataclass(frozen=True)
class Sizes:
    """The sizes of models and data that decide how much memory training takes.

    Attributes:
        transformer: configuration of the base's transformer.
        controlnet: configuration of the ControlNet.
        vae: configuration of the VAE if it decodes on the device, else None.
        latent: grid of the largest latents, (h, w).
        clip: tokens and width of the CLIP embeddings.
        t5: tokens and width of the T5 embeddings.
        validates: whether pictures are drawn.
        measures_held_out: whether the loss on held-out rows is measured.
    """

    transformer: Mapping[str, Any]
    controlnet: Mapping[str, Any]
    vae: Mapping[str, Any] | None
    latent: tuple[int, int]
    clip: tuple[int, int]
    t5: tuple[int, int]
    validates: bool
    measures_held_out: bool = False


@dataclass(frozen=True)
class Estimate:
    """The memory of a run, in bytes.

    Attributes:
        step: on the device, when a training step takes the most, by part.
        validation: on the device, when a validation takes the most; 0 without one.
        host: pinned host memory for what is offloaded.
        loading: host memory while the networks are loaded, before they are on the device.
    """

    step: dict[str, int]
    validation: int
    host: int
    loading: int

    @property
    def peak(self) -> int:
        """The most device memory at any time."""
        return max(sum(self.step.values()), self.validation)

    @property
    def need(self) -> Need:
        """What a machine must have."""
        return Need(self.peak, max(self.host, self.loading))


def uses_ddp() -> bool:
    """Return whether this is one of several processes that hold a whole copy each."""
    sharded = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    if any(os.environ.get(name, "false").lower() == "true" for name in sharded):
        return False
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def simulate(config: TrainConfig, sizes: Sizes) -> Estimate:
    """Estimate the memory of a run on one device, by a step and a validation without numbers."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        run = Simulation(config, sizes)
        step = run.fullest_step()
        validation = run.validation()
        return Estimate(step, validation, run.host, run.loading)


class Simulation:
    """A run on one device whose tensors have no numbers; to be used within a FakeTensorMode.

    Args:
        config: settings of the run.
        sizes: of models and data.

    Attributes:
        meter: counts the bytes on the device.
        buckets: the memory that DDP sends, by weight; gradients are copied or added into it.
        host: bytes of pinned host memory so far.
        loading: bytes of host memory when the networks are loaded.
        kept_bytes: of activations that waited for the backward pass of the last step.
    """

    def __init__(self, config: TrainConfig, sizes: Sizes) -> None:
        self.config, self.sizes = config, sizes
        self.meter = Meter()
        self.host = self.kept_bytes = 0
        self.dtype = WEIGHT_DTYPES[mixed_precision(config)]
        # In the order in which a run loads them.
        self.transformer = build_network(SD3Transformer2DModel, sizes.transformer, self.dtype)
        self.loading = network_bytes(self.transformer)
        prepare_base(config, self.transformer, quantize)
        if config.offload_base:
            self.host += stream_blocks(self.transformer, config.offload_base)
        self.controlnet = build_network(SD3ControlNetModel, sizes.controlnet, torch.float32)
        self.loading = max(self.loading, self.host + network_bytes(self.controlnet))
        prepare_controlnet(config, self.controlnet)
        cast_weights_at_use(self.controlnet)
        self.trained = trained_parameters(self.controlnet)
        self._count(self.transformer, "frozen base")
        self._count(self.controlnet, "ControlNet")
        self.buckets: dict[Any, Tensor] = {}
        if uses_ddp():
            self.buckets = {one: torch.empty_like(one) for one in self.trained}
        for bucket in self.buckets.values():
            self.meter.count(bucket, "gradients")
        self.optimizer_state = self._allocate_optimizer_state()
        self._leaving_state: Tensor | None = None
        self.ema = self._start_ema()
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def fullest_step(self) -> dict[str, int]:
        """Take an optimiser step; return the most bytes that it takes, by part."""
        self.step()
        fullest = max(self.meter.peak, self.between_steps(), key=lambda parts: sum(parts.values()))
        return {part: fullest.get(part, 0) for part in PARTS}

    def step(self) -> None:
        """Take an optimiser step."""
        with self.meter:
            batch = self._batch(self.config.train_batch_size)
            objective = self._objective()
            if self.config.gradient_accumulation_steps > 1:
                self._allocate_gradients()
            self.meter.reset_peak()
            before = self.meter.now["activations"]
            with self._activation_offload():
                losses = batch_losses(batch, self.controlnet, self.transformer, objective)
            self.kept_bytes = self.meter.now["activations"] - before
            losses.mean().backward()
            del losses
            for parameter in self.trained:
                if parameter.grad is not None:
                    self._update(parameter)
            for parameter in self.trained:
                parameter.grad = None
            self._leaving_state = None

    def between_steps(self) -> dict[str, int]:
        """Return the bytes by part when the most is held between the steps.

        That is before the second: DDP orders its buckets anew, and those that gradients lie in are
        freed only once the new ones are there.
        """
        held = dict(self.meter.now)
        if self.buckets and self.config.gradient_accumulation_steps > 1:
            held["gradients"] *= 2
        return held

    def validation(self) -> int:
        """Return the most bytes that drawing, decoding and the held-out loss take; 0 if none does.

        Of the held-out loss, batches of at most a step's size are left out: a step takes more.
        """
        held_out = 0
        if self.sizes.measures_held_out:
            held_out = self.config.validation_batch_size or 0
        measures = held_out > self.config.train_batch_size
        if not (self.sizes.validates or measures):
            return 0
        self.controlnet.eval()
        with self.meter, torch.no_grad():
            self.meter.reset_peak()
            with self._averaged(), self.ema.applied() if self.ema else nullcontext():
                if self.sizes.validates:
                    self._draw()
                if measures:
                    self._measure(held_out)
            if self.sizes.vae is not None:
                self._decode(self.sizes.vae)
        return sum(self.meter.peak.values())

    def _count(self, network: Any, part: str) -> None:
        for tensor in (*network.parameters(), *network.buffers()):
            self.meter.count(tensor, part)

    def _allocate_optimizer_state(self) -> Tensor:
        """Return a tensor as large as the optimiser's state on the device; count the rest."""
        on_device = 0
        for parameter in self.trained:
            size = state_bytes(self.config, parameter.shape)
            if self._offloads_state(parameter):
                self.host += size
            else:
                on_device += size
        state = torch.empty(on_device, dtype=torch.uint8)
        self.meter.count(state, "optimiser")
        return state

    def _offloads_state(self, parameter: Tensor) -> bool:
        return self.config.offload_optimizer and is_offloaded(parameter.numel())

    def _start_ema(self) -> Ema | None:
        if self.config.ema_decay is None:
            return None
        ema = Ema(self.controlnet, self.config.ema_decay)
        for tensor in ema.weights:
            self.meter.count(tensor, "average")
        return ema

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Take the memory of the trained weights while an optimiser's average is in their place."""
        kept = self.config.optimizer == SCHEDULE_FREE
        trained = [torch.empty_like(one) for one in self.trained] if kept else []
        for tensor in trained:
            self.meter.count(tensor, "average")
        yield

    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.meter.count(parameter.grad, "gradients")
        if self.buckets:
            parameter.grad = self.buckets[parameter]
        if self.config.fused_backward_pass:
            self._update(parameter)
            parameter.grad = None

    def _update(self, parameter: Tensor) -> None:
        """Take as much memory as the update of a weight does.

        Offloaded state is there three times: of this weight, of the one before, which leaves, and
        of the one after it. That one is taken to be as large.
        """
        visiting_state = arriving_state = None
        if self._offloads_state(parameter):
            size = state_bytes(self.config, parameter.shape)
            visiting_state, arriving_state = (
                torch.empty(size, dtype=torch.uint8) for _ in range(2)
            )
        with torch.no_grad(), in_float32(parameter):
            self._leaving_state = visiting_state
            del visiting_state, arriving_state

    def _allocate_gradients(self) -> None:
        """Create the gradients that an earlier batch of the same step left."""
        for parameter in self.trained:
            bucket = self.buckets.get(parameter)
            parameter.grad = torch.empty_like(parameter) if bucket is None else bucket
            self.meter.count(parameter.grad, "gradients")

    def _objective(self) -> Objective:
        table = torch.empty(1000)
        spec = LatentSpec(16, 8, 1.0, 0.0, "mean", "-1_1", dtype="float32")
        return Objective.from_config(
            self.config,
            sigmas=table,
            timesteps=table,
            latent_spec=spec,
            conditioning_spec=spec,
            pooled_projection=DEFAULT_POOLED_PROJECTION,
            controlnet_kind=kind_of(self.sizes.controlnet),
        )

    def _activation_offload(self) -> Any:
        if not self.config.offload_activations:
            return nullcontext()

        def is_weight(tensor: Tensor) -> bool:
            return self.meter.kind(tensor) in ("frozen base", "ControlNet")

        def count_host(size: int) -> None:
            self.host += size

        return DroppedActivations(is_weight, count_host)

    def _draw(self) -> None:
        """Take a denoising step of a validation's pictures."""
        config = self.config
        guided = config.validation_guidance_scale > 1
        batch = self._batch(config.num_validation_images * (2 if guided else 1))
        embeds = prompt_embeds(batch.clip_embeds, batch.t5_embeds).to(self.dtype)
        objective = self._objective()
        run_networks(
            self.controlnet,
            self.transformer,
            objective,
            control=control_of(batch.latent, batch.conditioning_mask, objective).to(self.dtype),
            noisy=batch.latent.to(self.dtype),
            timestep=batch.uniform,
            embeds=embeds,
            pooled=batch.pooled_embeds.to(self.dtype),
        )

    def _measure(self, count: int) -> None:
        """Take a batch of the held-out loss."""
        batch = self._batch(count)
        sigma = batch.uniform
        predict(batch, sigma, sigma, self.controlnet, self.transformer, self._objective())

    def _decode(self, vae_config: Mapping[str, Any]) -> None:
        """Decode one picture."""
        # Imported here so that training never loads a VAE.
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_config(dict(vae_config))
        for parameter in vae.decoder.parameters():
            self.meter.count(parameter, "decoder")
        vae.encoder = None
        vae.decode(torch.empty(1, vae.config.latent_channels, *self.sizes.latent))

    def _batch(self, count: int) -> Batch:
        """Return a batch of the largest latents."""
        sizes = self.sizes
        channels = int(sizes.transformer["in_channels"])
        latent = (count, channels, *sizes.latent)
        masked = bool(sizes.controlnet.get("extra_conditioning_channels"))
        return Batch(
            latent=torch.empty(latent, dtype=torch.bfloat16),
            conditioning_latent=torch.empty(latent, dtype=torch.bfloat16),
            clip_embeds=torch.empty(count, *sizes.clip, dtype=torch.bfloat16),
            t5_embeds=torch.empty(count, *sizes.t5, dtype=torch.bfloat16),
            pooled_embeds=torch.empty(count, int(sizes.transformer["pooled_projection_dim"])),
            noise=torch.empty(latent),
            uniform=torch.empty(count),
            normal=torch.empty(count),
            conditioning_mask=(
                torch.empty(count, 1, *sizes.latent, dtype=torch.uint8) if masked else None
            ),
        )
