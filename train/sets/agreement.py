"""Whether sets of samples can be mixed: the networks must see the same kind of data in all."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from common.errors import ConfigError
from shards.format.specs import LatentSpec, TextSpec
from train.sets.training_set import TrainingSet


def check_agreement(sets: Sequence[TrainingSet]) -> None:
    """Refuse sets that the networks would see differently; their sizes may differ.

    Raises:
        ConfigError: listing what differs, of the first set and of the first that is unlike it.
    """
    first = _seen_by_networks(sets[0])
    for other in sets[1:]:
        found = _seen_by_networks(other)
        wrong = [
            f"  {name}: {_in_words(first[name])}, {_in_words(found[name])}"
            for name in first
            if first[name] != found[name]
        ]
        if wrong:
            raise ConfigError(
                f"--cache {sets[0].location} and {other.location} (control "
                f"{other.cache.conditioning_name!r}) cannot be mixed:\n" + "\n".join(wrong) + "\n"
                "Run python -m precompute with the same base model and settings for both."
            )


def _in_words(value: Any) -> Any:
    return "no" if value is None else "yes" if value is True else value


def _seen_by_networks(one: TrainingSet) -> dict[str, Any]:
    """Return what must be alike, by name."""
    manifest = one.cache.manifest
    specs: dict[str, TextSpec | LatentSpec] = {
        "prompts": manifest.text_spec,
        "latents": manifest.latent_spec,
        "conditioning latents": one.cache.conditioning_spec,
    }
    # How transparent pixels were filled, and numbers scaled, may differ from control to control.
    left_out = ("background", "scale")
    return {
        f"{name}, {field.name}": getattr(spec, field.name)
        for name, spec in specs.items()
        for field in fields(spec)
        if field.name not in left_out
    }


def describe_encoders(sets: Sequence[TrainingSet]) -> str | None:
    """Return a line if prompts were not all encoded alike, which the networks take all the same."""
    if len({one.cache.manifest.text_identity for one in sets}) == 1:
        return None
    return (
        "the caches' prompts were encoded by other text encoders, or in other number formats; "
        "python -m shards info says what each was made with"
    )
