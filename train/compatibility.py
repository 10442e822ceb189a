"""Whether the cache, the base model, a ControlNet and a checkpoint go together."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import SD3ControlNetModel

from common.errors import ConfigError
from sd3.images import WHITE
from sd3.pooled_convention import FORCE_ZEROS, takes_zeros
from sd3.pretrained import (
    DATA_KEY,
    controlnet_mismatches,
    has_component,
    largest_side,
    read_config,
)
from sd3.value_scale import AS_IS
from shards.format.manifest import Manifest, data_digest
from shards.format.specs import LatentSpec, describe_annotator
from shards.reading.cache import Cache
from train.processes.strategy import STRATEGY_NAMES, strategy
from train.saving.checkpoints import TrainState

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
    checkpoint: Path, saved: TrainState, current: TrainState, manifest: Manifest
) -> None:
    """Refuse to resume if the sequence of samples would be a different one.

    Args:
        checkpoint: its folder.
        saved: what the checkpoint says.
        current: what the settings and the cache say.
        manifest: the cache's.

    Raises:
        ConfigError: listing what differs.
    """
    compared: list[Comparison] = [
        ("--seed", saved.seed, current.seed),
        ("--shuffle-window", saved.shuffle_window, current.shuffle_window),
        ("samples a step, all of one bucket", saved.bucket_group, current.bucket_group),
    ]
    wrong, changes = _different(compared), _data_changes(saved, current, manifest)
    if wrong or changes:
        table = f"{two_columns('checkpoint', 'now', wrong)}\n" if wrong else ""
        raise ConfigError(
            f"{checkpoint}: made with other data or another order, so going on would repeat and "
            f"skip samples:\n{table}{changes}"
            "Use the same, or start in another --output-dir with this checkpoint's controlnet/ as "
            "--controlnet-model-name-or-path."
        )


def _data_changes(saved: TrainState, current: TrainState, manifest: Manifest) -> str:
    """Return a line on what has changed in the cache since a checkpoint, or nothing."""
    names = sorted(saved.fingerprints.keys() | current.fingerprints.keys())
    others = [n for n in names if saved.fingerprints.get(n) != current.fingerprints.get(n)]
    if not others:
        return ""
    told: list[str] = []
    with contextlib.suppress(KeyError, TypeError):  # nobody checks what stands there for people
        since = data_digest(saved.fingerprints)
        for change in manifest.made_by.get("changes", []):
            if told or change["since"] == since:
                told.append(change["what"])
    what = f": {'; then '.join(map(str, told))}" if told else ""
    return f"  the cache has other {', '.join(others)}{what}\n"


def check_controlnet(controlnet: SD3ControlNetModel, base: Path, manifest: Manifest) -> None:
    """Check that training can continue from a ControlNet with this base model and this cache.

    Raises:
        ConfigError: listing what the ControlNet has and what is needed.
    """
    ours, theirs = dict(controlnet.config), read_config(base, "transformer")
    wrong = controlnet_mismatches(ours, theirs)
    needed = {
        "joint_attention_dim": theirs.get("joint_attention_dim"),
        "extra_conditioning_channels": 0,
        "use_pos_embed": True,
    }
    wrong += [
        f"  {name}: ControlNet {ours.get(name)}, training needs {value}"
        for name, value in needed.items()
        if ours.get(name) != value
    ]
    if int(ours["num_layers"]) > int(theirs["num_layers"]) // 2:
        wrong.append(f"  num_layers: ControlNet {ours['num_layers']}, base {theirs['num_layers']}")
    largest = max(max(bucket) for bucket in manifest.buckets)
    if largest > largest_side(ours):
        wrong.append(f"  positions a side: ControlNet {largest_side(ours)}, cache {largest}")
    if wrong:
        raise ConfigError("the ControlNet does not fit the base model:\n" + "\n".join(wrong))


def check_convention(name: str, config: Mapping[str, Any], cache: Cache) -> list[str]:
    """Check that a ControlNet goes on with data made as that which it was trained on.

    Args:
        name: the option's value, for messages.
        config: the ControlNet's configuration.
        cache: opened for reading.

    Returns:
        A line for each thing that changes or cannot be known.

    Raises:
        ConfigError: its conditioning images were in another range.
    """
    what = f"--controlnet-model-name-or-path {name}"
    pixel_range = cache.conditioning_spec.pixel_range
    tokens = cache.manifest.text_spec.max_sequence_length
    entry = config.get(DATA_KEY)
    data = entry if isinstance(entry, Mapping) else {}
    trained_range = data.get("conditioning_range")
    if trained_range not in (None, pixel_range):
        raise ConfigError(
            f"{what}: was trained on conditioning images in {trained_range}, and the cache's are "
            f"in {pixel_range}. Add the others to it: python -m precompute with "
            f"--conditioning-range {trained_range} --conditioning-name in_{trained_range} and the "
            "rest as before, then train with that --conditioning-name."
        )
    notes = []
    if takes_zeros(config):
        notes.append(
            "takes a zero pooled embedding and no VAE shift, by its config.json; it is converted "
            "to take both and computes the same. If train_controlnet_sd3.py made it, it was "
            f'trained with both: then write "{FORCE_ZEROS}": false there first'
        )
    if trained_range is None:
        notes.append(
            "does not say how its data was made; it goes on with conditioning images in "
            f"{pixel_range} and {tokens} T5 tokens, as in the cache"
        )
    elif (trained := data.get("max_sequence_length")) not in (None, tokens):
        notes.append(f"was trained with {trained} T5 tokens, and goes on with the cache's {tokens}")
    if data:
        notes += _other_controls(data, cache)
    return [f"{what}: {note}" for note in notes]


def _other_controls(data: Mapping[str, Any], cache: Cache) -> list[str]:
    """Return how a ControlNet's conditioning images were made otherwise than the cache's.

    Args:
        data: what its configuration says of its training data.
        cache: opened for reading.
    """
    notes = []
    were, spec = "the conditioning images of its training were", cache.conditioning_spec
    entry = data.get("annotator")
    trained = entry if isinstance(entry, Mapping) else {}
    annotator = cache.manifest.annotators.get(cache.conditioning_name)
    if trained.get("digest") != (annotator.digest if annotator else None):
        drawn = "nothing that its config.json names"
        if trained:
            drawn = describe_annotator(str(trained.get("name")), trained.get("arguments") or {})
        now = "came with its data"
        if annotator:
            now = f"are drawn by {describe_annotator(annotator.name, annotator.arguments)}"
        if now == f"are drawn by {drawn}":
            notes.append(f"{were} drawn by {drawn} of other code or weights than the cache's")
        else:
            notes.append(f"{were} drawn by {drawn}, and the cache's {now}")
    scale, trained_scale = spec.scale or AS_IS, data.get("conditioning_scale", AS_IS)
    if trained_scale != scale:
        notes.append(f"{were} of scale {trained_scale}, and the cache's are of scale {scale}")
    background = list(spec.background or WHITE)
    behind = list(data.get("background") or background)
    if behind != background:
        notes.append(f"{were} put over {behind} if transparent, and the cache's over {background}")
    return notes


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
