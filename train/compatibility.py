"""Whether the cache, the base model and a checkpoint go together, before any weights are read."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from common.errors import ConfigError
from sd3.pretrained import has_component, read_config
from shards.format.manifest import Manifest
from shards.format.specs import LatentSpec
from train.checkpoints import TrainState
from train.distribution import WAY_NAMES, way

Row = tuple[str, object, object]  # what, on the left, on the right


def check_base(base: Path, manifest: Manifest) -> None:
    """Hold the cache against the base model's configuration.

    Raises:
        ConfigError: with what the cache holds beside what the model needs.
    """
    config = read_config(base, "transformer")
    text, latent = manifest.text_spec, manifest.latent_spec
    try:
        patch, largest = int(config["patch_size"]), int(config["pos_embed_max_size"])
        joint, pooled = int(config["joint_attention_dim"]), int(config["pooled_projection_dim"])
        rows: list[Row] = [
            ("latent channels", latent.latent_channels, int(config["in_channels"])),
            ("T5 width (joint_attention_dim)", text.t5_width, joint),
            ("pooled width (pooled_projection_dim)", text.pooled_width, pooled),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{base / 'transformer' / 'config.json'}: not an SD3 transformer ({error!r})."
        ) from error
    wrong = [row for row in rows if row[1] != row[2]]
    if text.clip_width > joint:
        wrong.append(("CLIP width (joint_attention_dim)", text.clip_width, f"at most {joint}"))
    for height, width in manifest.buckets:
        grid = f"{height} x {width}"
        if max(height, width) > patch * largest:
            wrong.append(("latent grid (pos_embed_max_size)", grid, f"at most {patch * largest}"))
        if height % patch or width % patch:
            wrong.append(("latent grid (patch_size)", grid, f"multiples of {patch}"))
    if has_component(base, "vae"):
        wrong += _vae_rows(latent, read_config(base, "vae"))
    if wrong:
        raise ConfigError(
            f"the cache does not fit the base model {base}:\n{two_columns('cache', 'model', wrong)}"
            "\nRun python -m precompute with this base model, or train on the one that the cache "
            f"was made with ({manifest.made_by.get('base')})."
        )


def check_same_order(checkpoint: Path, found: TrainState, wanted: TrainState) -> None:
    """Refuse to resume where the sequence of samples would be another one.

    Raises:
        ConfigError: with what the checkpoint says beside what is now.
    """
    names = sorted(found.fingerprints.keys() | wanted.fingerprints.keys())
    rows: list[Row] = [
        ("--seed", found.seed, wanted.seed),
        ("--shuffle-window", found.shuffle_window, wanted.shuffle_window),
        ("samples a step, all of one bucket", found.bucket_group, wanted.bucket_group),
        *((name, found.fingerprints.get(name), wanted.fingerprints.get(name)) for name in names),
    ]
    wrong = [row for row in rows if row[1] != row[2]]
    if wrong:
        raise ConfigError(
            f"{checkpoint}: made with other data or another order, so going on would repeat and "
            f"skip samples:\n{two_columns('checkpoint', 'now', wrong)}\n"
            "Use the same, or start in another --output-dir with this checkpoint's controlnet/ as "
            "--controlnet-model-name-or-path."
        )


def check_same_distribution(checkpoint: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Hold the way that a checkpoint was shared out against the way that it is to go on.

    Raises:
        ConfigError: its optimiser's state cannot be read that way.
    """
    was, now = state.distribution, way(accelerator)
    if was != now:
        wrong = f"written with {WAY_NAMES[was]}, and this is {WAY_NAMES[now]}"
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


def two_columns(left: str, right: str, rows: list[Row]) -> str:
    """Return a table, a line a row, indented by two."""
    table = [("", left, right), *((name, str(one), str(other)) for name, one, other in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(2)]
    return "\n".join(
        f"  {name:<{widths[0]}}  {one:<{widths[1]}}  {other}".rstrip() for name, one, other in table
    )


def _vae_rows(latent: LatentSpec, vae: dict[str, Any]) -> list[Row]:
    """Return how a base's VAE would scale latents otherwise than the cache says."""
    shift = vae.get("shift_factor")
    rows: list[Row] = [
        ("VAE channels (latent_channels)", latent.latent_channels, vae.get("latent_channels")),
        ("VAE scale (scaling_factor)", latent.scaling_factor, vae.get("scaling_factor")),
        ("VAE shift (shift_factor)", latent.shift_factor, 0.0 if shift is None else shift),
    ]
    return [row for row in rows if row[1] != row[2]]
