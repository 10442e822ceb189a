"""Whether the cache, the base model and a checkpoint go together."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from common.errors import ConfigError
from sd3.pretrained import has_component, read_config
from shards.format.manifest import Manifest, data_digest
from shards.format.specs import LatentSpec
from train.processes.strategy import STRATEGY_NAMES, strategy
from train.saving.checkpoints import TrainState
from train.sets.identity import num_sets

Comparison = tuple[str, object, object]  # what is compared, the left value, the right value


def check_base(base: Path, manifest: Manifest) -> None:
    """Check that the cache was made for a base model like this one, by its configuration alone.

    Raises:
        ConfigError: listing what the cache holds and what the model needs.
    """
    config = read_config(base, "transformer")
    text, latent = manifest.text_spec, manifest.latent_spec
    try:
        patch, largest = int(config["patch_size"]), int(config["pos_embed_max_size"])
        joint, pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
        compared: list[Comparison] = [
            ("latent channels", latent.latent_channels, int(config["in_channels"])),
            ("T5 width (joint_attention_dim)", text.t5_width, joint),
            ("pooled width (pooled_projection_dim)", text.pooled_width, pooled),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{base / 'transformer' / 'config.json'}: not an SD3 transformer ({error!r})."
        ) from error
    wrong = _different(compared)
    if text.clip_width > joint:
        wrong.append(("CLIP width (joint_attention_dim)", text.clip_width, f"at most {joint}"))
    for height, width in manifest.buckets:
        grid = f"{height} x {width}"
        if max(height, width) > patch * largest:
            wrong.append(("latent grid (pos_embed_max_size)", grid, f"at most {patch * largest}"))
        if height % patch or width % patch:
            wrong.append(("latent grid (patch_size)", grid, f"multiples of {patch}"))
    if has_component(base, "vae"):
        wrong += _vae_mismatches(latent, read_config(base, "vae"))
    if wrong:
        raise ConfigError(
            f"the cache does not fit the base model {base}:\n{two_columns('cache', 'model', wrong)}"
            "\nRun python -m precompute with this base model, or train on the one that the cache "
            f"was made with ({manifest.made_by.get('base')})."
        )


def check_same_order(
    checkpoint: Path, saved: TrainState, current: TrainState, manifests: Sequence[Manifest]
) -> None:
    """Refuse to resume if the sequence of samples would be a different one.

    Args:
        checkpoint: its folder.
        saved: what the checkpoint says.
        current: what the settings and the cache say.
        manifests: of the caches.

    Raises:
        ConfigError: listing what differs.
    """
    compared: list[Comparison] = [
        ("--seed", saved.seed, current.seed),
        ("--shuffle-window", saved.shuffle_window, current.shuffle_window),
        ("samples a step, all of one bucket", saved.bucket_group, current.bucket_group),
    ]
    wrong, changes = _different(compared), _data_changes(saved, current, manifests)
    if wrong or changes:
        table = f"{two_columns('checkpoint', 'now', wrong)}\n" if wrong else ""
        raise ConfigError(
            f"{checkpoint}: made with other data or another order, so going on would repeat and "
            f"skip samples:\n{table}{changes}"
            "Use the same, or start in another --output-dir with this checkpoint's controlnet/ as "
            "--controlnet-model-name-or-path."
        )


def _data_changes(saved: TrainState, current: TrainState, manifests: Sequence[Manifest]) -> str:
    """Return a line on what has changed in the data since a checkpoint, or nothing."""
    were, are = (num_sets(state.fingerprints) for state in (saved, current))
    if were != are:
        return f"  the number of sets that are mixed was {were}, and is {are}\n"
    names = sorted(saved.fingerprints.keys() | current.fingerprints.keys())
    others = [n for n in names if saved.fingerprints.get(n) != current.fingerprints.get(n)]
    if not others:
        return ""
    told: list[str] = []
    with contextlib.suppress(KeyError, TypeError):  # nobody checks what stands there for people
        since = data_digest(saved.fingerprints)
        for change in manifests[0].made_by.get("changes", []) if are == 1 else []:
            if told or change["since"] == since:
                told.append(change["what"])
    what = f": {'; then '.join(map(str, told))}" if told else ""
    have = "the cache has" if are == 1 else "the caches have"
    return f"  {have} other {', '.join(others)}{what}\n"


def check_same_distribution(checkpoint: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Check that a checkpoint's optimiser state can be read with the current strategy.

    Raises:
        ConfigError: it cannot.
    """
    was, now = state.distribution, strategy(accelerator)
    if was != now:
        wrong = f"written with {STRATEGY_NAMES[was]}, and this is {STRATEGY_NAMES[now]}"
    elif now == "deepspeed" and state.num_processes != accelerator.num_processes:
        wrong = (
            f"written by {state.num_processes} processes of DeepSpeed, and these are "
            f"{accelerator.num_processes}"
        )
    else:
        return
    raise ConfigError(
        f"{checkpoint}: {wrong}, which reads another kind of optimiser state. Resume as before, or "
        "start in another --output-dir with this checkpoint's controlnet/ as "
        "--controlnet-model-name-or-path."
    )


def two_columns(left: str, right: str, compared: list[Comparison]) -> str:
    """Return a table with these headings and a line a comparison, indented by two spaces."""
    lines = [("", left, right), *((name, str(one), str(other)) for name, one, other in compared)]
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {one:<{widths[1]}}  {other}".rstrip() for name, one, other in lines
    )


def _different(compared: list[Comparison]) -> list[Comparison]:
    return [comparison for comparison in compared if comparison[1] != comparison[2]]


def _vae_mismatches(latent: LatentSpec, vae: dict[str, Any]) -> list[Comparison]:
    """Return where a base's VAE scales latents differently from what the cache says."""
    shift = vae.get("shift_factor")
    return _different(
        [
            ("VAE channels (latent_channels)", latent.latent_channels, vae.get("latent_channels")),
            ("VAE scale (scaling_factor)", latent.scaling_factor, vae.get("scaling_factor")),
            ("VAE shift (shift_factor)", latent.shift_factor, 0.0 if shift is None else shift),
        ]
    )
