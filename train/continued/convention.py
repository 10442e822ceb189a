"""Whether a ControlNet goes on with data made as that which it was trained on."""

from collections.abc import Mapping
from typing import Any

from common.errors import ConfigError
from sd3.controlnet.pooled_projection import PooledProjection, pooled_projection_of
from sd3.images import WHITE
from sd3.pretrained import DATA_KEY
from sd3.value_scale import AS_IS
from shards.format.specs import describe_annotator
from shards.reading.cache import Cache


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
    if trained_range is None:
        notes.append(
            "does not say how its data was made; it goes on with conditioning images in "
            f"{pixel_range} and {tokens} T5 tokens, as in the cache"
        )
    elif (trained := data.get("max_sequence_length")) not in (None, tokens):
        notes.append(f"was trained with {trained} T5 tokens, and goes on with the cache's {tokens}")
    was_with_t5, is_with_t5 = data.get("t5", True), not cache.manifest.text_spec.without_t5
    if data and was_with_t5 != is_with_t5:
        goes_on = "the cache's prompts have T5's part" if is_with_t5 else "the cache has none of it"
        notes.append(f"was trained {'with' if was_with_t5 else 'without'} T5, and {goes_on}")
    if data:
        notes += _other_controls(data, cache)
    return [f"{what}: {note}" for note in notes]


def describe_pooled_projection(
    name: str, config: Mapping[str, Any], now: PooledProjection
) -> str | None:
    """Return a line on what becomes of the convention of a ControlNet's inputs, if anything does.

    Args:
        name: the option's value.
        config: the ControlNet's configuration.
        now: the convention that training goes on in.
    """
    own = pooled_projection_of(config)
    if own == now == "prompt" or (own == now and DATA_KEY in config):
        return None
    if own == "prompt":
        return (
            f"--controlnet-model-name-or-path {name}: was trained with the prompt's pooled "
            "embedding and the VAE's shift; it is converted to take neither. It computes the same "
            "without the shift; what the pooled embedding told it is lost"
        )
    said = "it goes on so"
    if now == "prompt":
        said = "it is converted to take both and computes the same"
    script = ""
    if DATA_KEY not in config:
        script = (
            ". If train_controlnet_sd3.py made it, it was trained with both: then give "
            "--convention train_controlnet_sd3"
        )
    return (
        f"--controlnet-model-name-or-path {name}: takes a zero pooled embedding and no VAE shift, "
        f"by its config.json; {said}{script}"
    )


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
