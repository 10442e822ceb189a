"""What a run will take of a device's memory, and what would make it less."""

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common.errors import ConfigError
from sd3.pretrained import find_base, find_controlnet, read_config
from shards.reading.cache import Cache
from shards.remote.streaming import open_files
from train import models
from train.config import TrainConfig
from train.memory.simulation import Estimate, Sizes, mixed_precision, simulate

GB = 1e9
# What may help; each with the settings that it needs beside it.
REMEDIES: tuple[dict[str, Any], ...] = (
    {"mixed_precision": "bf16"},
    {"gradient_checkpointing": True},
    {"use_8bit_adam": True},
    {"quantize_base": "int8", "fp8_matmul": False},
    {"quantize_base": "nf4", "fp8_matmul": False},
    {"fused_backward_pass": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1},
    {"offload_optimizer": True},
    {"offload_activations": True},
    {"bf16_weights": True, "mixed_precision": "bf16"},
    {"validation_decode": "cpu"},
    {"num_validation_images": 1},
)


def find_sizes(config: TrainConfig) -> Sizes:
    """Return what decides a run's memory, reading configurations and the cache's manifest alone.

    Raises:
        ConfigError: base or ControlNet are not there, or do not fit.
        ShardError: nor is the cache.
    """
    files = open_files(config.cache, config.local_cache_dir, config.local_cache_gb)
    manifest = Cache(files, config.conditioning_name).manifest
    validates = config.validation_steps > 0
    validates &= manifest.validation[config.conditioning_name].num_records > 0
    decodes = validates and config.validation_decode == "vae"
    base = find_base(
        config.pretrained_model_name_or_path,
        ["transformer", *(["vae"] if decodes else [])],
        revision=config.revision,
        cache_dir=config.cache_dir,
        weights=False,
    )
    if config.controlnet_model_name_or_path is None:
        controlnet = models.controlnet_config(base, config.num_controlnet_layers)
    else:
        flag = "--controlnet-model-name-or-path"
        named = config.controlnet_model_name_or_path
        controlnet = read_config(find_controlnet(named, flag, cache_dir=config.cache_dir), "")
    text = manifest.text_spec
    return Sizes(
        transformer=read_config(base, "transformer"),
        controlnet=controlnet,
        vae=read_config(base, "vae") if decodes else None,
        latent=max(manifest.buckets, key=lambda bucket: bucket[0] * bucket[1]),
        clip=(text.clip_tokens, text.clip_width),
        t5=(text.max_sequence_length, text.t5_width),
        validates=validates,
    )


def remedies(config: TrainConfig, sizes: Sizes, now: Estimate) -> list[tuple[str, int]]:
    """Return flags that would make the peak smaller, with the bytes, the most helpful first.

    Args:
        config: of the run.
        sizes: of models and data.
        now: what the run takes as it is.
    """
    found = []
    for change in _changes(config):
        try:
            other = replace(config, **change)
        except ConfigError:
            continue
        vae = sizes.vae if other.validation_decode == "vae" else None
        saved = now.peak - simulate(other, replace(sizes, vae=vae)).peak
        if saved > now.peak / 100:
            found.append((" ".join(_flag(name, to) for name, to in change.items()), saved))
    return sorted(found, key=lambda one: -one[1])


def report(config: TrainConfig, sizes: Sizes, found: Estimate) -> str:
    """Return what a run will take, part by part, in lines."""
    height, width = (side * 8 for side in sizes.latent)
    samples = f"{config.train_batch_size} x {width} x {height} px a batch"
    lines = [f"memory of one device, nothing shared out, {samples}, in GB:"]
    lines += [f"{size / GB:8.2f}  {part}" for part, size in found.step.items() if size]
    lines.append(f"{sum(found.step.values()) / GB:8.2f}  a step at its fullest")
    if found.validation:
        what = "a validation, decoding included" if sizes.vae else "a validation"
        lines.append(f"{found.validation / GB:8.2f}  {what}")
    if found.host:
        lines.append(f"{found.host / GB:8.2f}  of host memory, for what is offloaded")
    lines.append("CUDA takes half a GB or so for itself.")
    return "\n".join(lines)


def advice(config: TrainConfig, sizes: Sizes, now: Estimate) -> str:
    """Return what would make it less, by how much, in lines."""
    found = remedies(config, sizes, now)
    lines = [f"{-saved / GB:+8.2f}  {flags}" for flags, saved in found]
    return "\n".join(["less, in GB, with", *lines]) if lines else "no option would make it less"


def _changes(config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Give changes to settings, without what is as it is."""
    changes = [change for change in REMEDIES if _goes(config, change)]
    if config.train_batch_size > 1:
        half, double = config.train_batch_size // 2, config.gradient_accumulation_steps * 2
        changes.append({"train_batch_size": half, "gradient_accumulation_steps": double})
    for change in changes:
        real = {name: to for name, to in change.items() if getattr(config, name) != to}
        if real:
            yield real


def _goes(config: TrainConfig, change: dict[str, Any]) -> bool:
    """Tell whether the run could be made so: see `train.distribution.check`."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if "fused_backward_pass" in change:
        return alone and mixed_precision(config) != "fp16"
    return alone or "bf16_weights" not in change


def _flag(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return flag if value is True else f"{flag} {value:g}" if value == 0 else f"{flag} {value}"
