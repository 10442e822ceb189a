"""What a run reads, found and checked before any weights are loaded."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
)

from common.device import keep_freed_memory, use_device
from common.errors import ConfigError
from sd3.base.find import find_base
from sd3.base.lora import Lora, find_loras
from sd3.controlnet.kinds import ControlNetKind, kind_of
from sd3.controlnet.pooled_projection import PooledProjection
from sd3.pretrained import read_config
from shards.format.json_files import digest
from shards.reading.cache import Cache
from shards.reading.mixed_order import MixedOrder
from train import distribution, models
from train.compatibility import check_base, check_same_order
from train.config import BY_RESOLUTION, TrainConfig
from train.continued.find import find_continued, find_pooled_projection
from train.loss import Objective
from train.objective import Timesteps, drawn_part, shifted
from train.optim.optimizer import check_optimizer
from train.processes.agreement import check_same_everywhere, local_main_first, main_decides
from train.saving.checkpoints import TrainState, read_state
from train.saving.resuming import check_same_optimizer, choose
from train.sets.find import find_sets
from train.sets.identity import data_fingerprints
from train.sets.training_set import TrainingSet
from train.validation.held_out import held_out_records
from train.validation.sampling import Pair, read_pairs
from train.watch.trackers import check_tracker


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found and checked.

    Attributes:
        sets: of samples that the run trains on, at least one.
        base: folder of the base model.
        loras: merged into its transformer.
        controlnet: folder of the ControlNet to continue from, or None.
        pooled_projection: the convention of the ControlNet's inputs.
        controlnet_kind: what the ControlNet's blocks read.
        order: the order of the samples.
        pairs: the validation pairs that the run draws; read at once, since stage 1 may replace them
            while the run goes on.
        measures_held_out: whether the run measures the loss on held-out rows.
        checkpoint: folder of the checkpoint to resume from, or None.
        state: where the run starts.
    """

    sets: list[TrainingSet]
    base: Path
    loras: list[Lora]
    controlnet: Path | None
    pooled_projection: PooledProjection
    controlnet_kind: ControlNetKind
    order: MixedOrder
    pairs: list[Pair]
    measures_held_out: bool
    checkpoint: Path | None
    state: TrainState

    @property
    def cache(self) -> Cache:
        """The first set's cache; the networks see the same kind of data in all."""
        return self.sets[0].cache

    @property
    def draws_pictures(self) -> bool:
        """Whether the run draws validation pictures."""
        return bool(self.pairs)

    @property
    def validates(self) -> bool:
        """Whether there is anything to validate."""
        return self.draws_pictures or self.measures_held_out


def find_inputs(config: TrainConfig, num_processes: int) -> Inputs:
    """Open and check everything the run reads, before any weights are loaded.

    Raises:
        ShardError: the cache is missing, incomplete or damaged.
        ConfigError: the base model, the cache and the checkpoint do not go together.
    """
    require_packages(config)
    sets, order = find_sets(config, samples_per_step(config, num_processes))
    cache = sets[0].cache
    validates = config.validation_steps > 0
    measures_held_out = validates and any(held_out_records(one.cache) for one in sets)
    if config.keep_best and not measures_held_out:
        raise ConfigError(
            "--keep-best: there is no held-out loss to choose by. Give --validation-steps, and "
            "hold rows out of training: precompute --validation-rows 128."
        )
    if config.dropout_t5 and cache.manifest.text_spec.without_t5:
        raise ConfigError(
            f"--dropout-t5 {config.dropout_t5:g}: the cache was made without T5, so there is "
            "nothing to drop; leave it out."
        )
    pairs = _pairs(sets) if validates else []
    needs_vae = bool(pairs) and config.validation_decode != "latents"
    base = local_main_first(lambda: _find_base(config, needs_vae))
    loras = local_main_first(lambda: find_loras(config.lora, config.lora_scale, config.cache_dir))
    for one in sets:
        check_base(base, one.cache.manifest)
    controlnet = None
    if config.controlnet_model_name_or_path is not None:
        controlnet = find_continued(
            config.controlnet_model_name_or_path, config, [one.cache for one in sets]
        )
    _check_same_everywhere(sets, base, controlnet)
    checkpoint, state = main_decides(lambda: _find_start(config, sets, order))
    return Inputs(
        sets=sets,
        base=base,
        loras=loras,
        controlnet=controlnet,
        pooled_projection=find_pooled_projection(
            config, controlnet, checkpoint, inpainting=bool(cache.conditioning_spec.inpainting)
        ),
        controlnet_kind=_find_kind(config, controlnet, cache),
        order=order,
        pairs=pairs,
        measures_held_out=measures_held_out,
        checkpoint=checkpoint,
        state=state,
    )


def _pairs(sets: list[TrainingSet]) -> list[Pair]:
    """Return the validation pairs of all sets, those of one control of one cache once."""
    caches = {(str(one.cache.files), one.cache.conditioning_name): one.cache for one in sets}
    return [pair for cache in caches.values() for pair in read_pairs(cache)]


def _find_base(config: TrainConfig, needs_vae: bool) -> Path:
    """Return the base model's folder, which has all components that the run needs."""
    components = ("transformer", "scheduler", *(["vae"] if needs_vae else []))
    try:
        return find_base(
            config.pretrained_model_name_or_path,
            components,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
            single_file_config=config.single_file_config,
            transformer=config.transformer,
        )
    except ConfigError as error:
        hint = (
            " Validation pictures need vae/; --validation-decode latents does without, and "
            "--validation-steps 0."
            if needs_vae and "vae/" in str(error)
            else ""
        )
        raise ConfigError(f"{error}{hint}") from error


def _find_kind(config: TrainConfig, controlnet: Path | None, cache: Cache) -> ControlNetKind:
    """Return the kind of the ControlNet, that of a folder or of a new one.

    Raises:
        ConfigError: the cache is for inpainting, whose stock pipeline knows one kind alone.
    """
    if controlnet is None:
        kind = config.controlnet_kind or "joint"
    else:
        kind = kind_of(read_config(controlnet, ""))
    if kind == "stability" and cache.conditioning_spec.inpainting:
        raise ConfigError(
            "a ControlNet of Stability's kind reads no text, and the cache is for inpainting, "
            "whose stock pipeline gives it some: train one of --controlnet-kind joint."
        )
    return kind


def _check_same_everywhere(sets: list[TrainingSet], base: Path, controlnet: Path | None) -> None:
    """Refuse to train if the processes found different caches or revisions of models."""
    validation = [
        [one.cache.validation.product.fingerprint, one.cache.manifest.held_out] for one in sets
    ]
    check_same_everywhere(
        {
            "--cache": digest([data_fingerprints(sets), validation]),
            "--pretrained-model-name-or-path": base.name,
            "--controlnet-model-name-or-path": controlnet.name if controlnet else "none",
        }
    )


def _find_start(
    config: TrainConfig, sets: list[TrainingSet], order: MixedOrder
) -> tuple[Path | None, TrainState]:
    """Return the checkpoint to resume from and its state, or None and the state of a new run."""
    new = TrainState(
        step=0,
        place=0,
        seed=config.seed,
        shuffle_window=config.shuffle_window,
        bucket_group=order.step_group,
        fingerprints=data_fingerprints(sets),
    )
    checkpoint = choose(config.output_dir, config.resume_from_checkpoint)
    if checkpoint is None:
        return None, new
    saved = read_state(checkpoint)
    check_same_order(checkpoint, saved, new, [one.cache.manifest for one in sets])
    check_same_optimizer(checkpoint, config)
    return checkpoint, saved


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator: devices, processes, precision, accumulation and tracker.

    Raises:
        ConfigError: the device does not support the precision, or training does not support the
            strategy that accelerate is set up for.
    """
    check_tracker(config.report_to)  # before accelerate warns of it
    precision = models.mixed_precision(config)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(config.output_dir),
                logging_dir=str(config.output_dir / config.logging_dir),
            ),
            # The schedule steps once an optimiser step, whatever the number of processes.
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                # No buffer changes, so none need be sent at each pass; and the gradients lie in
                # the memory that is sent, instead of being copied into it.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
            ],
        )
    except ValueError as error:
        raise ConfigError(f"--mixed-precision {precision}: {error}") from error
    use_device(accelerator.device)
    keep_freed_memory(accelerator.device)
    distribution.check(accelerator, config)
    if precision == "fp16" and accelerator.device.type == "cpu" and accelerator.scaler is None:
        raise ConfigError(
            "--mixed-precision fp16: accelerate scales no losses on CPUs; use bf16 or no."
        )
    return accelerator


def samples_per_step(config: TrainConfig, num_processes: int) -> int:
    """Return the number of samples an optimiser step, on all processes."""
    return config.train_batch_size * num_processes * config.gradient_accumulation_steps


def num_train_steps(config: TrainConfig, inputs: Inputs, step_samples: int) -> int:
    """Return the number of the run's last optimiser step.

    Epochs are counted by samples: a run that goes on with more or fewer samples per step than
    before ends at the same place.

    Args:
        config: of the run.
        inputs: what it reads, and where it starts.
        step_samples: samples of an optimiser step, on all processes.
    """
    if config.max_train_steps is not None:
        return config.max_train_steps
    left = max(0, inputs.order.start(config.num_train_epochs) - inputs.state.place)
    return inputs.state.step + math.ceil(left / step_samples)


def make_objective(config: TrainConfig, inputs: Inputs, device: torch.device) -> Objective:
    """Return the objective with the base scheduler's tables on the device."""
    scheduler = models.load_scheduler(inputs.base)
    schedule = find_timesteps(config, inputs.base, float(scheduler.config.shift))
    for one in inputs.sets:
        _check_drawn_part(scheduler.sigmas, schedule, one.cache)
    return Objective.from_config(
        config,
        schedule=schedule,
        sigmas=scheduler.sigmas.to(device, torch.float32),
        timesteps=scheduler.timesteps.to(device, torch.float32),
        latent_spec=inputs.cache.manifest.latent_spec,
        conditioning_spec=inputs.cache.conditioning_spec,
        pooled_projection=inputs.pooled_projection,
        controlnet_kind=inputs.controlnet_kind,
    )


def find_timesteps(config: TrainConfig, base: Path, base_shift: float) -> Timesteps:
    """Return how the base's schedule is shifted, and which part of it is drawn.

    Args:
        config: of the run.
        base: folder of the base model, whose transformer says what size it was made for.
        base_shift: of its schedule.
    """
    ends = (config.min_timestep, config.max_timestep)
    if config.shift == BY_RESOLUTION:
        native_side = int(read_config(base, "transformer")["sample_size"])
        return Timesteps(1.0, native_side**2, *ends)
    shift = base_shift if config.shift is None else float(config.shift)
    return Timesteps(shift / base_shift, None, *ends)


def _check_drawn_part(sigmas: torch.Tensor, schedule: Timesteps, cache: Cache) -> None:
    """Refuse timesteps between which the schedule has no entry."""
    for height, width in cache.manifest.buckets:
        levels = shifted(sigmas, schedule.shift_for(height, width)) * len(sigmas)
        first, last = drawn_part(levels, schedule.low, schedule.high)
        if first >= last:
            raise ConfigError(
                f"--min-timestep {schedule.low} and --max-timestep {schedule.high}: the schedule "
                f"has no timestep between them; its lowest is {float(levels[-1]):.1f}."
            )


def require_packages(config: TrainConfig) -> None:
    """Refuse settings whose optional package is not installed, or which the optimiser refuses."""
    for needed, package, extra in (
        (config.quantize_base == "nf4", "bitsandbytes", "bitsandbytes"),
    ):
        if needed and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} is not installed: pip install '.[{extra}]'")
    check_optimizer(config)
