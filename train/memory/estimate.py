"""How much device memory a run will take, and which options would reduce it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from common.device import free_gpu_bytes
from common.errors import ConfigError
from common.memory.need import CUDA_BYTES, GB, LOST_SHARE, Need
from common.memory.processes import map_in_processes
from common.options import as_arguments, flag
from sd3.base.find import find_base
from sd3.controlnet.block_counts import describe_count, in_words
from sd3.pretrained import find_controlnet, largest_side, read_config, vae_factor
from sd3.prompt_embeds import CLIP_TOKENS
from train import models
from train.config import DEFAULT_SEQUENCE_LENGTH, Checkpointing, TrainConfig
from train.distribution import UNSUPPORTED
from train.memory.simulation import Estimate, Sizes, simulate
from train.models import mixed_precision
from train.optim.named import ADAMW, ADAMW_8BIT
from train.optim.optimizer import check_optimizer
from train.sets.find import open_caches

# Changes that may help, each with the settings that it requires.
REMEDIES: tuple[dict[str, Any], ...] = (
    {"mixed_precision": "bf16"},
    {"optimizer": ADAMW_8BIT},
    {"quantize_base": "int8"},
    {"quantize_base": "nf4"},
    {"fused_backward_pass": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1},
    {"offload_optimizer": True},
    {"offload_activations": True},
    {"bf16_weights": True, "mixed_precision": "bf16"},
    {"validation_decode": "cpu"},
    {"num_validation_images": 1},
)


def need(config: TrainConfig, free: int | None) -> Need:
    """Return the memory that a run takes, from configurations alone.

    Args:
        config: settings of the run; `resolution` says the size where there is no cache yet.
        free: makes no difference here; training chooses nothing by it.

    Raises:
        ConfigError: the base or the ControlNet is missing, or they do not go together.
        ShardError: the cache is missing.
    """
    del free
    return simulate(config, find_sizes(config)).need


def find_sizes(config: TrainConfig) -> Sizes:
    """Return the sizes that decide a run's memory, from configurations and the cache's manifest.

    Without a cache, of one with validation pairs, held-out rows and squares of
    `config.resolution`.

    Raises:
        ConfigError: the base or the ControlNet is missing, or they do not go together; or the
            optimiser does not take its arguments.
        ShardError: the cache is missing.
    """
    if config.optimizer_args:  # else its package need not be there
        check_optimizer(config)
    caches = open_caches(config) if config.cache else []
    manifest = caches[0].manifest if caches else None
    validates = measures_held_out = config.validation_steps > 0
    if caches:
        validates &= any(cache.validation.product.num_records for cache in caches)
        measures_held_out &= any(cache.manifest.held_out for cache in caches)
    decodes = validates and config.validation_decode == "vae"
    base = find_base(
        config.pretrained_model_name_or_path,
        ["transformer", *(["vae"] if decodes or manifest is None else [])],
        revision=config.revision,
        cache_dir=config.cache_dir,
        weights=False,
        single_file_config=config.single_file_config,
        transformer=config.transformer,
    )
    if config.controlnet_model_name_or_path is None:
        extra = caches[0].conditioning_spec if caches else None
        controlnet = models.controlnet_config(
            base,
            config.num_controlnet_layers,
            extra_channels=extra.extra_channels if extra else 0,
            kind=config.controlnet_kind or "joint",
        )
    else:
        folder = find_controlnet(
            config.controlnet_model_name_or_path,
            "--controlnet-model-name-or-path",
            cache_dir=config.cache_dir,
            weights=False,
        )
        controlnet = read_config(folder, "")
    transformer = read_config(base, "transformer")
    if manifest is None:
        latent, clip, t5 = _planned_records(config, base, transformer)
    else:
        text = manifest.text_spec
        grids = [bucket for cache in caches for bucket in cache.manifest.buckets]
        latent = max(grids, key=lambda bucket: bucket[0] * bucket[1])
        clip = text.clip_tokens, text.clip_width
        t5 = text.max_sequence_length, text.t5_width
    return Sizes(
        transformer=transformer,
        controlnet=controlnet,
        vae=read_config(base, "vae") if decodes else None,
        latent=latent,
        clip=clip,
        t5=t5,
        validates=validates,
        measures_held_out=measures_held_out,
    )


def _planned_records(
    config: TrainConfig, base: Path, transformer: dict[str, Any]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return `latent`, `clip` and `t5` of `Sizes` for a cache that is yet to be made.

    Raises:
        ConfigError: the base has no positions for so large a picture, or is no SD3 model.
    """
    assert config.resolution is not None
    factor = vae_factor(base)
    side, largest = config.resolution // factor, largest_side(transformer)
    if side > largest:
        raise ConfigError(
            f"--resolution {config.resolution}: {base} has positions for {largest * factor} px at "
            "most."
        )
    try:
        # CLIP's two embeddings are as wide side by side as their pooled ones.
        clip_width = int(transformer["pooled_projection_dim"])
        t5_width = int(transformer["joint_attention_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{base / 'transformer' / 'config.json'}: not an SD3 transformer ({error!r})."
        ) from error
    tokens = config.max_sequence_length or DEFAULT_SEQUENCE_LENGTH
    return (side, side), (CLIP_TOKENS, clip_width), (tokens, t5_width)


def remedies(config: TrainConfig, sizes: Sizes, now: Estimate) -> list[tuple[str, int]]:
    """Return flags that would reduce the peak, with the bytes saved, the largest saving first."""
    changes = []
    for change in _possible_changes(config, int(sizes.transformer["num_layers"])):
        with contextlib.suppress(ConfigError):  # the two do not go together
            changes.append((change, replace(config, **change)))

    def peak(changed: TrainConfig) -> int:
        vae = sizes.vae if changed.validation_decode == "vae" else None
        return simulate(changed, replace(sizes, vae=vae)).peak

    peaks = map_in_processes(peak, [changed for _, changed in changes])
    savings = [
        (as_arguments(change), now.peak - less)
        for (change, _), less in zip(changes, peaks, strict=True)
    ]
    worthwhile = [saving for saving in savings if saving[1] > now.peak / 100]
    return sorted(worthwhile, key=lambda saving: -saving[1])


def report(config: TrainConfig, sizes: Sizes, estimate: Estimate) -> str:
    """Return the memory that a run will take, part by part, in lines."""
    height, width = (side * 8 for side in sizes.latent)
    samples = f"{config.train_batch_size} x {width} x {height} px a batch"
    lines = [f"memory of one device, nothing shared out, {samples}, in GB:"]
    lines += [f"{size / GB:8.2f}  {part}" for part, size in estimate.step.items() if size]
    lines.append(f"{sum(estimate.step.values()) / GB:8.2f}  a step at its fullest")
    if estimate.validation:
        what = "a validation, decoding included" if sizes.vae else "a validation"
        lines.append(f"{estimate.validation / GB:8.2f}  {what}")
    lines.append(
        f"{estimate.need.free / GB:8.2f}  must be free: the most of these, {LOST_SHARE:.0%} for "
        f"gaps and {CUDA_BYTES / GB:g} for CUDA itself{_free_now()}"
    )
    if estimate.host:
        lines.append(f"{estimate.host / GB:8.2f}  of host memory, for what is offloaded")
    lines.append(f"{estimate.loading / GB:8.2f}  of host memory while the networks are loaded")
    blocks, of_base = int(sizes.controlnet["num_layers"]), int(sizes.transformer["num_layers"])
    lines.append(
        describe_count(blocks, of_base)
        or f"{blocks} ControlNet blocks; {in_words(of_base)} are the same in diffusers and ComfyUI"
    )
    return "\n".join(lines)


def _free_now() -> str:
    """Return how much a GPU of this machine has free, in words; nothing without one."""
    free = free_gpu_bytes(None)
    return "" if free is None else f"; {free / GB:.2f} is free on this machine"


def advice(config: TrainConfig, sizes: Sizes, now: Estimate) -> str:
    """Return which options would reduce the memory, and by how much, in lines."""
    lines = [f"{-saved / GB:+8.2f}  {flags}" for flags, saved in remedies(config, sizes, now)]
    return "\n".join(["less, in GB, with", *lines]) if lines else "no option would make it less"


def _possible_changes(config: TrainConfig, num_blocks: int) -> Iterator[dict[str, Any]]:
    """Yield changes to the settings, for a base of some blocks, without what is set already."""
    levels = get_args(Checkpointing)
    stronger = [{"checkpointing": one} for one in levels[levels.index(config.checkpointing) + 1 :]]
    known = (*REMEDIES, *stronger, {"offload_base": num_blocks})
    changes = [change for change in known if _is_supported(config, change)]
    if config.train_batch_size > 1:
        half, double = config.train_batch_size // 2, config.gradient_accumulation_steps * 2
        changes.append({"train_batch_size": half, "gradient_accumulation_steps": double})
    for change in changes:
        new = {name: value for name, value in change.items() if getattr(config, name) != value}
        if new:
            yield new


def _is_supported(config: TrainConfig, change: dict[str, Any]) -> bool:
    """Return whether `train.distribution.check` would accept a change."""
    launched = {
        name
        for name in ("fsdp", "deepspeed")
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true"
    }
    # In 8 bit it is still AdamW; another optimiser would learn otherwise.
    if "optimizer" in change and (launched or config.optimizer != ADAMW):
        return False
    refused = {option for strategy, option, _ in UNSUPPORTED if strategy in launched}
    if refused & {*map(flag, change), *(as_arguments({one: change[one]}) for one in change)}:
        return False
    one_process = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if "fused_backward_pass" in change:
        return one_process and mixed_precision(config) != "fp16"
    return one_process or "bf16_weights" not in change
