"""Finds the ControlNet that training goes on from, and checks that it fits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from accelerate import PartialState
from diffusers import SD3ControlNetModel

from common.errors import ConfigError
from sd3.controlnet.kinds import kind_of
from sd3.controlnet.pooled_projection import (
    DEFAULT_POOLED_PROJECTION,
    PooledProjection,
    pooled_projection_of,
)
from sd3.controlnet.unsaved_convention import corrected
from sd3.pretrained import (
    DATA_KEY,
    controlnet_mismatches,
    find_controlnet,
    largest_side,
    read_config,
)
from shards.format.manifest import Manifest
from shards.reading.cache import Cache
from train.config import TrainConfig
from train.continued.convention import check_convention, describe_pooled_projection
from train.processes.agreement import local_main_first
from train.saving.controlnet import CONTROLNET_FOLDER

FLAG = "--controlnet-model-name-or-path"


def find_continued(name: str, config: TrainConfig, caches: Sequence[Cache]) -> Path:
    """Return the folder of the ControlNet to continue from; say what its convention means.

    Raises:
        ConfigError: there is none, or it does not go with the caches or the settings.
    """
    folder = local_main_first(lambda: find_controlnet(name, FLAG, cache_dir=config.cache_dir))
    saved = read_config(folder, "")
    if config.convention != "saved" and DATA_KEY in saved:
        raise ConfigError(
            f"--convention {config.convention}: {FLAG} {name} was trained by python -m train, as "
            "its config.json says. Leave --convention out."
        )
    controlnet = corrected(saved, config.convention)
    if config.num_controlnet_layers not in (None, controlnet.get("num_layers")):
        raise ConfigError(
            f"--num-controlnet-layers {config.num_controlnet_layers}: is for a new ControlNet; "
            f"{FLAG} {name} has {controlnet.get('num_layers')}. Leave one out."
        )
    kind = kind_of(controlnet)
    if config.controlnet_kind not in (None, kind):
        raise ConfigError(
            f"--controlnet-kind {config.controlnet_kind}: is for a new ControlNet; {FLAG} {name} "
            f"is of the kind {kind}. Leave one out."
        )
    notes = dict.fromkeys(
        note for cache in caches for note in check_convention(name, controlnet, cache)
    )
    if PartialState().is_main_process:
        for note in notes:
            click.echo(f"train: {note}")
    return folder


def find_pooled_projection(
    config: TrainConfig, controlnet: Path | None, checkpoint: Path | None, *, inpainting: bool
) -> PooledProjection:
    """Return the convention of the ControlNet's inputs; say what it means for one to go on from.

    Args:
        config: of the run; its own setting wins.
        controlnet: folder of the ControlNet to continue from, or None.
        checkpoint: folder of the checkpoint to resume from, or None.
        inpainting: whether the cache is for it.

    Raises:
        ConfigError: the checkpoint is of the other convention, or inpainting has one alone.
    """
    wanted = config.pooled_projection
    if inpainting:
        if wanted == "prompt":
            raise ConfigError(
                "--pooled-projection prompt: the cache is for inpainting, and the stock inpainting "
                "pipeline passes zeros, whatever a ControlNet was trained with; leave it out."
            )
        return "zeros"
    if checkpoint is not None:
        held = pooled_projection_of(read_config(checkpoint, CONTROLNET_FOLDER))
        if wanted not in (None, held):
            raise ConfigError(
                f"{checkpoint}: was trained with --pooled-projection {held}, and this is {wanted}. "
                "Leave it out, or start in another --output-dir with this checkpoint's controlnet/ "
                "as --controlnet-model-name-or-path."
            )
        return held
    if controlnet is None:
        return wanted or DEFAULT_POOLED_PROJECTION
    name = str(config.controlnet_model_name_or_path)
    saved = corrected(read_config(controlnet, ""), config.convention)
    chosen = wanted or pooled_projection_of(saved)
    note = describe_pooled_projection(name, saved, chosen)
    if note is not None and PartialState().is_main_process:
        click.echo(f"train: {note}")
    return chosen


def check_controlnet(
    controlnet: SD3ControlNetModel, base: Path, manifest: Manifest, extra_channels: int
) -> None:
    """Check that training can continue from a ControlNet with this base model and this cache.

    Raises:
        ConfigError: listing what the ControlNet has and what is needed.
    """
    ours, theirs = dict(controlnet.config), read_config(base, "transformer")
    wrong = controlnet_mismatches(ours, theirs)
    embeds_latents = kind_of(ours) == "joint"
    needed: dict[str, Any] = {}
    if embeds_latents:
        needed = {"joint_attention_dim": theirs.get("joint_attention_dim"), "use_pos_embed": True}
    wrong += [
        f"  {name}: ControlNet {ours.get(name)}, training needs {value}"
        for name, value in needed.items()
        if ours.get(name) != value
    ]
    if extra_channels != ours.get("extra_conditioning_channels", 0):
        wrong.append(
            f"  extra_conditioning_channels: ControlNet {ours.get('extra_conditioning_channels')}, "
            f"cache {extra_channels}; python -m precompute --num-extra-conditioning-channels 1 "
            "makes a cache for inpainting"
        )
    if int(ours["num_layers"]) > int(theirs["num_layers"]) // 2:
        wrong.append(f"  num_layers: ControlNet {ours['num_layers']}, base {theirs['num_layers']}")
    largest = max(max(bucket) for bucket in manifest.buckets)
    if embeds_latents and largest > largest_side(ours):
        wrong.append(f"  positions a side: ControlNet {largest_side(ours)}, cache {largest}")
    if wrong:
        raise ConfigError("the ControlNet does not fit the base model:\n" + "\n".join(wrong))
