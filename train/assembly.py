"""A run with everything loaded, from its settings."""

import math
import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common.device import compile_blocks
from sd3.controlnet.conversion import convert_to, set_pooled_projection
from sd3.pretrained import DATA_KEY
from sd3.quantized import quantize
from train import distribution, models
from train.compatibility import check_same_distribution
from train.config import TrainConfig
from train.continued.find import check_controlnet
from train.inputs import (
    Inputs,
    find_inputs,
    make_accelerator,
    make_objective,
    num_train_steps,
    samples_per_step,
)
from train.loss import Objective
from train.memory.activation_offload import OffloadedActivations
from train.memory.cast_weights import cast_weights_at_use
from train.memory.streamed_base import StreamedBlocks
from train.models import trained_parameters
from train.optim.ema import Ema
from train.optim.fused_backward import FusedBackward
from train.optim.learning_rate import (
    describe_change,
    make_schedule,
    peak_learning_rate,
    set_learning_rate,
)
from train.optim.optimizer import make_optimizer
from train.saving.controlnet import restore_ema, use_diffusers_format
from train.saving.output_dir import output_dir_locked
from train.saving.resuming import (
    check_same_model,
    describe_base_change,
    describe_step_change,
    restore,
)
from train.sets.data_entry import mixed_entry


@dataclass(frozen=True)
class Run:
    """A run with everything loaded.

    Attributes:
        config: its settings.
        inputs: what it reads.
        accelerator: its devices and processes.
        controlnet: trained; as accelerate prepared it.
        transformer: frozen, on the device.
        optimizer: as accelerate prepared it.
        schedule: of the learning rate, as accelerate prepared it.
        objective: what is minimised.
        fused: takes the optimiser's steps within the backward pass, or None.
        activation_offload: entered for the forward pass; decides where activations are kept.
        ema: the moving average of the ControlNet's weights, or None.
        num_steps: the step at which the run ends.
        num_trained: number of trained parameters.
        held: what the run holds until it is closed, such as its output folder.
    """

    config: TrainConfig
    inputs: Inputs
    accelerator: Accelerator
    controlnet: Any
    transformer: Any
    optimizer: Any
    schedule: Any
    objective: Objective
    fused: FusedBackward | None
    activation_offload: AbstractContextManager[Any]
    ema: Ema | None
    num_steps: int
    num_trained: int
    held: ExitStack = field(default_factory=ExitStack)

    def print(self, line: str) -> None:
        """Print a line above the progress bar, on the main process only."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def close(self) -> None:
        """Let go of what the run holds: the hooks of its fused backward pass, its output folder."""
        if self.fused is not None:
            self.fused.close()
        self.held.close()


def assemble(config: TrainConfig) -> Run:
    """Load and prepare everything that a run works with, and restore its checkpoint.

    The run has its output folder to itself until it is closed.

    Raises:
        ConfigError: settings, base model, cache and checkpoint do not go together, or another run
            writes to the output folder.
        ShardError: the cache is incomplete or damaged.
    """
    _set_arithmetic(config)
    accelerator = make_accelerator(config)
    with ExitStack() as held:
        held.enter_context(output_dir_locked(config.output_dir))
        run = _load(config, accelerator)
        return replace(run, held=held.pop_all())


def _load(config: TrainConfig, accelerator: Accelerator) -> Run:
    inputs = find_inputs(config, accelerator.num_processes)
    if inputs.checkpoint is not None:
        check_same_distribution(inputs.checkpoint, inputs.state, accelerator)
    torch.manual_seed(config.seed)

    controlnet, transformer = _load_networks(config, inputs, accelerator)
    trained = trained_parameters(controlnet)
    num_trained = sum(parameter.numel() for parameter in trained)
    step_samples = samples_per_step(config, accelerator.num_processes)
    num_steps = num_train_steps(config, inputs, step_samples)
    optimizer = make_optimizer(config, trained, step_samples)
    schedule = make_schedule(config, optimizer, num_steps)
    use_diffusers_format(accelerator)
    controlnet, optimizer, schedule = distribution.prepare(
        accelerator, config, controlnet, optimizer, schedule
    )
    if inputs.checkpoint is not None:
        check_same_model(inputs.checkpoint, accelerator.unwrap_model(controlnet))
        restore(accelerator, inputs.checkpoint, optimizer_on_host=config.offload_optimizer)
        # accelerate counts batches to find the ends of optimiser steps. A checkpoint is such an
        # end, but with another accumulation the restored count would not be.
        accelerator.step = 0
        for said in (
            describe_base_change(inputs.checkpoint, config),
            describe_step_change(
                inputs.checkpoint, inputs.state, config, accelerator.num_processes
            ),
        ):
            if said is not None:
                accelerator.print(said)
        peak = peak_learning_rate(config, step_samples)
        was, now = set_learning_rate(schedule.scheduler, peak)
        if not math.isclose(was, now, rel_tol=1e-6):
            accelerator.print(describe_change(config, inputs.checkpoint, was, now))
    activation_offload: AbstractContextManager[Any] = nullcontext()
    if config.offload_activations:
        activation_offload = OffloadedActivations(controlnet, transformer)
    return Run(
        config=config,
        inputs=inputs,
        accelerator=accelerator,
        controlnet=controlnet,
        transformer=transformer,
        optimizer=optimizer,
        schedule=schedule,
        objective=make_objective(config, inputs, accelerator.device),
        fused=FusedBackward(optimizer.optimizer) if config.fused_backward_pass else None,
        activation_offload=activation_offload,
        ema=_make_ema(config, inputs, accelerator.unwrap_model(controlnet)),
        num_steps=num_steps,
        num_trained=num_trained,
    )


def _set_arithmetic(config: TrainConfig) -> None:
    """Choose how exact the GPU's float32 products are, and whether all it computes is repeatable.

    Call this before CUDA starts.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        # cuBLAS reads it at its start. Its streams then share no workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # Only programs that read memory before they write it would notice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _load_networks(
    config: TrainConfig, inputs: Inputs, accelerator: Accelerator
) -> tuple[Any, Any]:
    """Return the ControlNet, and the transformer on the device.

    The transformer leaves host memory before the ControlNet is loaded.
    """
    dtype = models.WEIGHT_DTYPES[accelerator.mixed_precision]
    transformer = models.load_transformer(inputs.base, config.variant, dtype, inputs.loras)
    models.prepare_base(config, transformer, partial(quantize, device=accelerator.device))
    if config.offload_base:
        StreamedBlocks(transformer, config.offload_base, accelerator.device)
    else:
        transformer.to(accelerator.device)
    controlnet = load_controlnet(config, inputs)
    if config.compile:
        compile_blocks(controlnet, transformer)
    return controlnet, transformer


def load_controlnet(config: TrainConfig, inputs: Inputs) -> Any:
    """Return the ControlNet that a run starts with, as it trains it, in host memory."""
    convention = inputs.pooled_projection
    if inputs.controlnet is None:
        controlnet = models.new_controlnet(
            inputs.base,
            config.variant,
            config.num_controlnet_layers,
            convention,
            inputs.cache.conditioning_spec.extra_channels,
            inputs.controlnet_kind,
        )
    else:
        controlnet = models.load_controlnet(inputs.controlnet)
        if config.convention == "train_controlnet_sd3":
            set_pooled_projection(controlnet, "prompt")
        spec = inputs.cache.conditioning_spec
        for one in inputs.sets:
            check_controlnet(controlnet, inputs.base, one.cache.manifest, spec.extra_channels)
        convert_to(
            convention,
            controlnet,
            scaling_factor=spec.scaling_factor,
            # Inpainting has the shift in either convention.
            shift_factor=0.0 if spec.inpainting else spec.shift_factor,
        )
    data = mixed_entry(inputs.sets)
    if config.dropout_t5:
        data["dropout_t5"] = config.dropout_t5  # it draws with and without T5
    controlnet.register_to_config(**{DATA_KEY: data})
    models.prepare_controlnet(config, controlnet)
    cast_weights_at_use(controlnet)
    return controlnet


def _make_ema(config: TrainConfig, inputs: Inputs, controlnet: Any) -> Ema | None:
    """Return the moving average of the weights, restored if the run resumes; None without one."""
    if config.ema_decay is None:
        return None
    ema = Ema(controlnet, config.ema_decay)
    if inputs.checkpoint is not None:
        restore_ema(inputs.checkpoint, ema, inputs.state.averaged_steps)
    return ema
