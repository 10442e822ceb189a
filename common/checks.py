"""Checks of settings that several stages share."""

from collections.abc import Sequence
from typing import TypeVar

from common.errors import ConfigError

T = TypeVar("T")
RESOLUTION_STEP_PX = 16
MAX_SEQUENCE_LENGTH = 512


def pair_up(
    prompts: tuple[str, ...], images: tuple[T, ...], prompt_flag: str, image_flag: str
) -> list[tuple[str, T]]:
    """Return (prompt, image) pairs, from equal numbers of both or from one of either.

    Raises:
        ConfigError: the numbers do not match; names the two options.
    """
    all_prompts = prompts * len(images) if len(prompts) == 1 else prompts
    all_images = images * len(prompts) if len(images) == 1 else images
    if len(all_prompts) != len(all_images) or bool(prompts) != bool(images):
        raise ConfigError(
            f"{len(prompts)} {prompt_flag} and {len(images)} {image_flag}: give as many of one as "
            "of the other, or one of either."
        )
    return list(zip(all_prompts, all_images, strict=True))


def for_each(values: Sequence[float], count: int) -> list[float]:
    """Return a value for each of `count` things, from one for all or one for each."""
    return list(values) * (count if len(values) == 1 else 1)


def check_resolution(resolution: int, flag: str = "--resolution") -> None:
    """Refuse sizes that SD3 does not support: the VAE divides by 8, the transformer's patch by 2.

    Args:
        resolution: in pixels.
        flag: the option, for the error message.

    Raises:
        ConfigError: names the nearest sizes that work.
    """
    if resolution <= 0 or resolution % RESOLUTION_STEP_PX:
        below = max(resolution // RESOLUTION_STEP_PX, 1) * RESOLUTION_STEP_PX
        raise ConfigError(
            f"{flag} {resolution}: must be divisible by {RESOLUTION_STEP_PX} (VAE f8, "
            f"patches of 2); try {below} or {below + RESOLUTION_STEP_PX}."
        )


def check_sequence_length(tokens: int) -> None:
    """Refuse T5 lengths that the stock pipeline does not support.

    Raises:
        ConfigError: names the bound.
    """
    if not 1 <= tokens <= MAX_SEQUENCE_LENGTH:
        raise ConfigError(
            f"--max-sequence-length {tokens}: must be 1 to {MAX_SEQUENCE_LENGTH}, which is as "
            "long as diffusers' pipeline takes."
        )
