"""The settings of stage 1."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ImageColor

from precompute.images import BACKGROUND
from shards.checks import check_resolution, check_sequence_length, pair_up
from shards.errors import ConfigError
from shards.manifest import CONTROL_NAME, DEFAULT_CONDITIONING
from shards.options import option


@dataclass(frozen=True)
class PrecomputeConfig:
    """Encode a data set's prompts, images and conditioning images into a cache.

    Run again with the same settings it checks and keeps what is there; after an interruption it
    goes on.
    """

    source: Path = option(help="fill50k: the folder with prompt.json, or the zip itself.")
    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder or a hub id; only VAE, text encoders and tokenizers "
        "are read."
    )
    output_dir: Path = option(help="The cache's folder.")
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    cache_dir: Path | None = option(None, help="Where downloaded models are kept.")
    resolution: int = option(
        512, help="Images are resized and centre-cropped to this square, in pixels."
    )
    background: str = option(
        BACKGROUND, help="Colour behind transparent pixels, by name or as #rrggbb."
    )
    max_sequence_length: int = option(
        77, help="T5 tokens a prompt; inference uses the same number."
    )
    max_train_samples: int | None = option(
        None, help="Encode so many rows at most, chosen by --seed; a larger number keeps those."
    )
    seed: int = option(0, help="Of the choice of rows.")
    conditioning_name: str = option(DEFAULT_CONDITIONING, help="Name of this kind of control.")
    conditioning_range: Literal["-1_1", "0_1"] = option(
        "-1_1",
        help="Range of conditioning pixels before the VAE. -1_1 is what the stock pipeline does "
        "at inference; 0_1 repeats the diffusers training script.",
    )
    posterior: Literal["mean", "mean_std"] = option(
        "mean",
        help="Keep the mean of the VAE's posterior, or mean and standard deviation, from which "
        "training samples anew at each step (twice the size).",
    )
    validation_prompt: tuple[str, ...] = option(
        (), help="Prompts of the validation pairs; repeatable."
    )
    validation_image: tuple[Path, ...] = option(
        (),
        help="Conditioning images of the validation pairs; repeatable. One prompt goes with "
        "all images, or one image with all prompts.",
    )
    cache_dtype: Literal["float16", "bfloat16", "float32"] = option(
        "float16", help="Number format of everything stored."
    )
    vae_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", help="Number format the VAE computes in."
    )
    text_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", help="Number format the text encoders compute in."
    )
    vae_batch_size: int = option(8, help="Images encoded at a time.")
    text_batch_size: int = option(32, help="Prompts encoded at a time.")
    shard_mb: float = option(
        128.0, help="Shards hold as many records as fit this size, in 10^6 bytes."
    )
    max_bad_fraction: float = option(
        0.01, help="Stop when more than this fraction of the rows cannot be used."
    )
    strict: bool = option(False, help="Stop at the first row that cannot be used.")
    device: str | None = option(None, help="cuda, cuda:1, mps or cpu; the best there is if absent.")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ConfigError: naming the option.
        """
        check_resolution(self.resolution)
        check_sequence_length(self.max_sequence_length)
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ConfigError(
                f"--background {self.background}: no colour; try white, or #ffffff."
            ) from error
        for name in ("vae_batch_size", "text_batch_size"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(self, name)}: must be at least 1.")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ConfigError(f"--max-train-samples {self.max_train_samples}: must be at least 1.")
        if self.shard_mb <= 0:
            raise ConfigError(f"--shard-mb {self.shard_mb:g}: must be above 0.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"--max-bad-fraction {self.max_bad_fraction}: must be in 0 to 1.")
        if not re.fullmatch(CONTROL_NAME, self.conditioning_name):
            raise ConfigError(
                f"--conditioning-name {self.conditioning_name!r}: letters, digits, - and _ only; "
                "it names a folder."
            )
        self.validation_pairs()

    def validation_pairs(self) -> list[tuple[str, Path]]:
        """Return the (prompt, conditioning image) pairs that training will draw.

        Raises:
            ConfigError: the numbers of prompts and images do not go together.
        """
        return pair_up(
            self.validation_prompt,
            self.validation_image,
            "--validation-prompt",
            "--validation-image",
        )
