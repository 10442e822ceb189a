"""A run with everything loaded, from its settings."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common.device import compile_blocks
from sd3.pretrained import DATA_KEY
from train import checkpoints, distribution, models
from train.compatibility import check_same_distribution
from train.config import TrainConfig
from train.inputs import (
    WEIGHT_DTYPES,
    Inputs,
    find_inputs,
    make_accelerator,
    make_objective,
    num_train_steps,
    samples_a_step,
)
from train.loss import Objective
from train.memory.activation_offload import OffloadedActivations
from train.optim.adamw import (
    make_optimizer,
    make_schedule,
    peak_learning_rate,
    set_learning_rate,
)
from train.optim.ema import Ema
from train.optim.fused_backward import FusedBackward


@dataclass(frozen=True)
class Run:
    """A run with everything loaded.

    Attributes:
        config: its settings.
        inputs: what it reads.
        accelerator: its devices and processes.
        controlnet: trained; as accelerate prepared it.
        transformer: frozen.
        optimizer: as accelerate prepared it.
        schedule: likewise.
        objective: what is minimised.
        fused: takes the optimiser's steps within the backward pass, or None.
        saving: entered for the forward pass; says where activations go.
        average: of the ControlNet's weights, or None.
        num_steps: at which it ends.
        num_trained: weights that change.
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
    saving: AbstractContextManager[Any]
    average: Ema | None
    num_steps: int
    num_trained: int

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line)


def assemble(config: TrainConfig) -> Run:
    """Load and prepare everything that a run works with, and restore its checkpoint.

    Raises:
        ConfigError: settings, base model, cache and checkpoint do not go together.
        ShardError: the cache is incomplete or damaged.
    """
    accelerator = make_accelerator(config)
    inputs = find_inputs(config, accelerator.num_processes)
    if inputs.checkpoint is not None:
        check_same_distribution(inputs.checkpoint, inputs.state, accelerator)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32

    if inputs.controlnet is None:
        controlnet = models.new_controlnet(
            inputs.base, config.variant, config.num_controlnet_layers
        )
    else:
        controlnet = models.load_controlnet(inputs.controlnet)
        models.check_controlnet(controlnet, inputs.base)
    weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]
    transformer = models.load_transformer(
        inputs.base,
        config.variant,
        weight_dtype,
        config.quantize_base,
        fp8_matmul=config.fp8_matmul,
    )
    data = models.data_entry(inputs.cache.manifest, inputs.cache.conditioning_spec)
    controlnet.register_to_config(force_zeros_for_pooled_projection=False, **{DATA_KEY: data})
    models.freeze_unused(controlnet)
    if config.bf16_weights:
        models.keep_in_bfloat16(controlnet)
    controlnet.train()
    if config.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
        transformer.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(controlnet, transformer)
    transformer.to(accelerator.device)

    step_samples = samples_a_step(config, accelerator.num_processes)
    num_steps = num_train_steps(config, inputs.order, step_samples)
    trained = [parameter for parameter in controlnet.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    optimizer = make_optimizer(config, trained, step_samples)
    schedule = make_schedule(config, optimizer, num_steps)
    checkpoints.use_diffusers_format(accelerator)
    controlnet, optimizer, schedule = distribution.prepare(
        accelerator, config, controlnet, optimizer, schedule
    )
    if inputs.checkpoint is not None:
        checkpoints.check_same_model(inputs.checkpoint, accelerator.unwrap_model(controlnet))
        accelerator.load_state(str(inputs.checkpoint))
        # It counts batches, to know where an optimiser step ends; a checkpoint always is such an
        # end, but with another accumulation the count would say otherwise.
        accelerator.step = 0
        set_learning_rate(schedule.scheduler, peak_learning_rate(config, step_samples))
    fused = FusedBackward(optimizer.optimizer) if config.fused_backward_pass else None
    average = None
    if config.ema_decay is not None:
        average = Ema(accelerator.unwrap_model(controlnet), config.ema_decay)
        if inputs.checkpoint is not None:
            checkpoints.restore_average(inputs.checkpoint, average, inputs.state.averaged_steps)
    return Run(
        config=config,
        inputs=inputs,
        accelerator=accelerator,
        controlnet=controlnet,
        transformer=transformer,
        optimizer=optimizer,
        schedule=schedule,
        objective=make_objective(config, inputs, accelerator.device),
        fused=fused,
        saving=OffloadedActivations(controlnet, transformer)
        if config.offload_activations
        else nullcontext(),
        average=average,
        num_steps=num_steps,
        num_trained=num_trained,
    )
