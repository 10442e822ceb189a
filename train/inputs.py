"""What a run is made of; mistakes are found before anything heavy is loaded."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, ProjectConfiguration

from common.errors import ConfigError, ShardError
from sd3.pretrained import find_base, find_controlnet
from shards.reading.cache import Cache
from shards.reading.order import Order
from shards.remote.streaming import open_files
from train import checkpoints, distribution, models
from train.checkpoints import TrainState
from train.compatibility import check_base, check_same_order
from train.config import TrainConfig
from train.loss import Objective
from train.validation.held_out import held_out_records

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found and checked.

    Attributes:
        cache: opened.
        base: folder of the base model.
        controlnet: folder of the ControlNet to go on from, or None.
        order: of the samples.
        draws: whether validation pictures are to be drawn.
        measures: whether the loss on held-out rows is to be measured.
        checkpoint: to resume from, or None.
        state: where the run starts.
    """

    cache: Cache
    base: Path
    controlnet: Path | None
    order: Order
    draws: bool
    measures: bool
    checkpoint: Path | None
    state: TrainState


def find_inputs(config: TrainConfig, num_processes: int) -> Inputs:
    """Open and check everything the run reads, before any weights are loaded.

    Args:
        config: names it.
        num_processes: that train together.

    Raises:
        ShardError: the cache is missing, incomplete or damaged.
        ConfigError: the base model, the cache and the checkpoint do not go together.
    """
    _require_packages(config)
    files = open_files(config.cache, config.local_cache_dir, config.local_cache_gb)
    cache = Cache(files, config.conditioning_name)
    if not sum(cache.manifest.training_records(config.conditioning_name)):
        raise ShardError(f"{config.cache}: the cache holds no samples")
    draws = config.validation_steps > 0 and cache.validation.product.num_records > 0
    measures = config.validation_steps > 0 and bool(held_out_records(cache))
    decodes = draws and config.validation_decode != "latents"
    needed = ("transformer", "scheduler", *(["vae"] if decodes else []))
    try:
        base = find_base(
            config.pretrained_model_name_or_path,
            needed,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
        )
    except ConfigError as error:
        hint = (
            " Validation pictures need vae/; --validation-decode latents does without, and "
            "--validation-steps 0."
            if decodes
            else ""
        )
        raise ConfigError(f"{error}{hint}") from error
    check_base(base, cache.manifest)

    named = config.controlnet_model_name_or_path
    controlnet = (
        None
        if named is None
        else find_controlnet(named, "--controlnet-model-name-or-path", cache_dir=config.cache_dir)
    )

    product = cache.conditioning.product
    order = Order(
        cache.manifest.training_records(config.conditioning_name),
        seed=config.seed,
        window=config.shuffle_window,
        shard_buckets=product.shard_buckets,
        group=samples_a_step(config, num_processes),
    )
    checkpoint = checkpoints.choose(config.output_dir, config.resume_from_checkpoint)
    start = TrainState(
        step=0,
        place=0,
        seed=config.seed,
        shuffle_window=config.shuffle_window,
        bucket_group=order.group,
        fingerprints=cache.manifest.fingerprints(config.conditioning_name),
    )
    state = start
    if checkpoint is not None:
        state = checkpoints.read_state(checkpoint)
        check_same_order(checkpoint, state, start)
    return Inputs(cache, base, controlnet, order, draws, measures, checkpoint, state)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator: devices, processes, precision, accumulation and tracker.

    Raises:
        ConfigError: the device cannot compute in the wanted precision, or accelerate is set up for
            a way to distribute that is not supported.
    """
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(config.output_dir),
                logging_dir=str(config.output_dir / config.logging_dir),
            ),
            # The schedule steps once an optimiser step, on every number of processes.
            step_scheduler_with_optimizer=False,
            # A pass uses each weight once; kept, 16 bit copies of all would be held to its end.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
    except ValueError as error:
        raise ConfigError(f"--mixed-precision {config.mixed_precision}: {error}") from error
    distribution.check(accelerator, config)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("--mixed-precision fp16: CPUs have no fp16 autocast; use bf16 or no.")
    return accelerator


def samples_a_step(config: TrainConfig, num_processes: int) -> int:
    """Return how many samples an optimiser step takes, on all processes."""
    return config.train_batch_size * num_processes * config.gradient_accumulation_steps


def num_train_steps(config: TrainConfig, order: Order, step_samples: int) -> int:
    """Return how many optimiser steps the run has.

    Args:
        config: says so outright, or in epochs.
        order: says how many places these have.
        step_samples: consumed by an optimiser step, on all processes.
    """
    if config.max_train_steps is not None:
        return config.max_train_steps
    return math.ceil(order.start(config.num_train_epochs) / step_samples)


def make_objective(config: TrainConfig, inputs: Inputs, device: torch.device) -> Objective:
    """Return the objective with the base scheduler's tables on the device."""
    scheduler = models.load_scheduler(inputs.base)
    return Objective(
        sigmas=scheduler.sigmas.to(device, torch.float32),
        timesteps=scheduler.timesteps.to(device, torch.float32),
        latent_spec=inputs.cache.manifest.latent_spec,
        conditioning_spec=inputs.cache.conditioning_spec,
        weighting_scheme=config.weighting_scheme,
        logit_mean=config.logit_mean,
        logit_std=config.logit_std,
        mode_scale=config.mode_scale,
        precondition_outputs=bool(config.precondition_outputs),
    )


def _require_packages(config: TrainConfig) -> None:
    for wanted, package, extra in (
        (config.report_to == "wandb", "wandb", "wandb"),
        (config.use_8bit_adam, "bitsandbytes", "bitsandbytes"),
        (config.quantize_base == "nf4", "bitsandbytes", "bitsandbytes"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed: pip install '.[{extra}]'")
