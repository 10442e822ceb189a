"""The settings of stage 1."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ImageColor

from common.checks import check_resolution, check_sequence_length, pair_up
from common.errors import ConfigError
from common.options import option
from precompute.planning.workers import find_part
from precompute.sources.source import SourceSettings
from sd3.buckets import STEP_PX
from sd3.images import BACKGROUND
from shards.format.manifest import CONTROL_NAME, DEFAULT_CONDITIONING


@dataclass(frozen=True)
class PrecomputeConfig:
    """Encode a data set's prompts, images and conditioning images into a cache.

    Run again with the same settings it checks and keeps what is there; after an interruption it
    goes on.
    """

    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder or a hub id; only VAE, text encoders and tokenizers "
        "are read."
    )
    cache: Path = option(help="The cache's folder.")
    source: str | None = option(
        None, help="fill50k: the folder with prompt.json, or the zip itself; or any local data set."
    )
    dataset_name: str | None = option(None, help="A data set of the hub by its id, or a folder.")
    dataset_config_name: str | None = option(None, help="Configuration of the data set.")
    dataset_revision: str | None = option(None, help="Revision of the data set on the hub.")
    train_data_dir: str | None = option(
        None,
        help="A folder with images and metadata.jsonl, WebDataset tars, Parquet, or whatever else "
        "the datasets library reads.",
    )
    image_column: str = option("image", help="Column of the images.")
    conditioning_image_column: str = option(
        "conditioning_image", help="Column of the conditioning images."
    )
    caption_column: str = option("text", help="Column of the captions, or of lists of captions.")
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    cache_dir: Path | None = option(None, help="Where downloaded models and data sets are kept.")
    resolution: int = option(
        512, help="Images are resized and centre-cropped to this square, in pixels."
    )
    buckets: bool = option(
        False,
        help="Give every image the shape nearest its own instead, of about the same area, with "
        "sides that are multiples of 64.",
    )
    random_flip: bool = option(
        False, help="Have every image, with its conditioning image, a second time, mirrored."
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
    seed: int = option(0, help="Of the choices of rows.")
    conditioning_name: str = option(
        DEFAULT_CONDITIONING,
        help="Name of this kind of control; a new one is added to those that the cache holds.",
    )
    conditioning_from: str | None = option(
        None,
        help="Draw the conditioning images from the images: canny, or package.module:function, "
        "which takes and returns a PIL image.",
    )
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
    validation_rows: int = option(
        0,
        help="Hold out so many rows, chosen by --seed; training measures its loss on them and "
        "does not learn from them.",
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
    vae_batch_size: int | Literal["auto"] = option(
        8, help="Images encoded at a time; auto: as many as the GPU's memory takes."
    )
    text_batch_size: int | Literal["auto"] = option(
        32, help="Prompts encoded at a time; auto likewise."
    )
    allow_tf32: bool = option(True, help="Let the GPU multiply float32 in TensorFloat-32.")
    compile: bool = option(False, help="Compile the encoders with torch.compile.")
    dataloader_num_workers: int = option(
        4, help="Threads that decode and resize images ahead of the VAE."
    )
    shard_mb: float = option(
        128.0, help="Shards hold as many records as fit this size, in 10^6 bytes."
    )
    max_bad_fraction: float = option(
        0.01, help="Stop when more than this fraction of the rows cannot be used."
    )
    strict: bool = option(False, help="Stop at the first row that cannot be used.")
    part: str | None = option(
        None,
        help="i/n: make only the i-th of n parts, counted from 0; for machines and jobs that know "
        "nothing of each other.",
    )
    dry_run: bool = option(
        False, help="Say what would be made, its size and the time it takes, and write nothing."
    )
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
        for name in ("vae_batch_size", "text_batch_size", "dataloader_num_workers"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {value}: must be at least 1.")
        if self.buckets and self.resolution % STEP_PX:
            raise ConfigError(
                f"--resolution {self.resolution}: with --buckets it must be a multiple of "
                f"{STEP_PX}; try {max(1, round(self.resolution / STEP_PX)) * STEP_PX}."
            )
        find_part(self.part, {})
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ConfigError(f"--max-train-samples {self.max_train_samples}: must be at least 1.")
        if self.validation_rows < 0:
            raise ConfigError(f"--validation-rows {self.validation_rows}: must be at least 0.")
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

    def source_settings(self) -> SourceSettings:
        """Return where the rows come from."""
        return SourceSettings(
            source=self.source,
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            dataset_revision=self.dataset_revision,
            train_data_dir=self.train_data_dir,
            image_column=self.image_column,
            conditioning_image_column=self.conditioning_image_column,
            caption_column=self.caption_column,
            cache_dir=self.cache_dir,
            wants_conditioning=self.conditioning_from is None,
        )

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
