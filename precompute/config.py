"""The settings of stage 1."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ImageColor

from common.checks import check_resolution, check_sequence_length, pair_up
from common.errors import ConfigError
from common.memory.processes import num_cores
from common.options import flag, option
from precompute.planning.views.random_crops import RandomCrops, parse_crop_scale
from precompute.planning.workers import find_part
from precompute.sources.source import SourceSettings
from sd3.annotators.arguments import parse_arguments
from sd3.buckets import STEP_PX
from sd3.images import BACKGROUND, OtherShape
from sd3.value_scale import AS_IS, parse_scale
from shards.format.manifest import CONTROL_NAME, DEFAULT_CONDITIONING

CROP_SCALE = "0.5:1"
MOST_LOADERS = 16  # they decode more than any GPU encodes


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Encode a data set's prompts, images and conditioning images into a cache.

    A second run with the same settings checks the cache and keeps it. After an interruption, the
    same command continues.
    """

    source: str | None = option(
        None,
        help="Data set on the disk, in any layout that --train-data-dir takes.",
        heading="Data",
    )
    train_data_dir: str | None = option(
        None,
        help="Data set: a folder or zip of images with caption files, a table or prompt.json; "
        "WebDataset tars; Parquet, or anything else that the datasets library reads.",
    )
    dataset_name: str | None = option(None, help="Data set: an id on the hub, or a folder.")
    dataset_config_name: str | None = option(None, help="Configuration of the data set.")
    dataset_revision: str | None = option(None, help="Revision of the data set on the hub.")
    split: str | None = option(
        None, help="Split of the data set; by default train, or the only one."
    )
    image_column: str = option(
        "image", help="Column that holds the images; in tars an ending, or several: jpg;png."
    )
    conditioning_image_column: str = option(
        "conditioning_image", help="Column that holds the conditioning images."
    )
    caption_column: str = option(
        "text",
        help="Column that holds the captions, or lists of captions; in tars also json.FIELD.",
    )
    caption: str | None = option(
        None,
        help="Caption of all rows, in place of the data set's; it may be empty, and {name} in it "
        "stands for the image's file name without folder and ending.",
    )
    caption_extension: str | None = option(
        None,
        help="Ending of the caption files beside the images; by default .txt or .caption.",
    )
    conditioning_data_dir: str | None = option(
        None, help="Folder, or zip, of conditioning images with the names of the images."
    )
    conditioning_from: str | None = option(
        None,
        help="Draw the conditioning images from the images: canny, softedge, lineart, blur, grey, "
        "superres, jpeg, mask, strokes, depth, a name of controlnet-aux, or your own code as "
        "package.module:function or path/to/file.py:function, which takes and returns a PIL image.",
    )
    conditioning_args: tuple[str, ...] = option(
        (),
        help="key=value, an argument of what --conditioning-from names, e.g. low_threshold=50; "
        "repeatable.",
    )
    num_extra_conditioning_channels: int = option(
        0,
        help="1 makes a cache for inpainting: the conditioning images are masks, white where the "
        "picture is to be drawn anew; kept are the latent of the picture without that part, and "
        "the mask. --conditioning-from strokes draws masks.",
    )
    max_train_samples: int | None = option(
        None, help="Encode at most this many rows, chosen by --seed; a larger number keeps them."
    )
    random_flip: bool = option(
        False, help="Add every image and its conditioning image a second time, mirrored."
    )
    views: int = option(
        1,
        help="Crops of each image and its conditioning image that are kept, each as a pair of its "
        "own: the centre crop, and random ones, drawn by --seed.",
    )
    crop_scale: str = option(
        CROP_SCALE,
        help="LOW:HIGH, how large random crops are: their sides as a share of those of the largest "
        "crop, drawn between the two.",
    )
    seed: int = option(0, help="Seed for the choice of rows, and for random crops.")
    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder, a hub id or a .safetensors file; only VAE, text "
        "encoders and tokenizers are read.",
        heading="Base model",
    )
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    single_file_config: str | None = option(
        None,
        help="Of a one-file base: folder or hub id of the configurations, tokenizers and whatever "
        "else it lacks; by default the published model of its kind.",
    )
    lora: tuple[str, ...] = option(
        (),
        help="LoRA to merge into the base: a .safetensors file, a folder or a hub id; repeatable. "
        "Needs the extra [lora].",
    )
    lora_scale: tuple[float, ...] = option(
        (1.0,), help="Strength of the LoRAs: one for all, or one for each."
    )
    cache_dir: Path | None = option(
        None, help="Folder for downloaded models and data sets; not the cache of shards."
    )
    cache: Path = option(
        help="The cache's folder.",
        heading="Cache",
        aliases=("output_dir", "shards"),
        unless="estimate",
    )
    dry_run: bool = option(
        False, help="Print what would be made, its size and the time needed; write nothing."
    )
    overwrite: bool = option(
        False,
        help="Go ahead though more than a tenth of what stands in the cache would be encoded "
        "again or dropped.",
    )
    conditioning_name: str = option(
        DEFAULT_CONDITIONING,
        help="Name of this kind of control; a new name adds a second control to the cache.",
    )
    cache_dtype: Literal["float16", "bfloat16", "float32"] = option(
        "float16", help="Number format of the stored tensors."
    )
    posterior: Literal["mean", "mean_std"] = option(
        "mean",
        help="Store the mean of the VAE's posterior, or mean and standard deviation, from which "
        "training samples at each step (twice the size).",
    )
    shard_mb: float = option(
        128.0, help="Size of a shard at most, in 10^6 bytes; two are in memory."
    )
    resolution: int = option(
        512,
        help="Side of the square, in pixels, to which images are resized and centre-cropped.",
        heading="Images and captions",
    )
    buckets: bool = option(
        False,
        help="Give each image the shape nearest to its own instead of a square: about the same "
        "area, sides that are multiples of 64.",
    )
    background: str = option(
        BACKGROUND, help="Colour behind transparent pixels, by name or as #rrggbb."
    )
    conditioning_scale: str = option(
        AS_IS,
        help="Which numbers of conditioning images become black and white: as-is takes 8 bit as "
        "they are and of 16 bit the upper 8; LOW:HIGH, e.g. 0:5000, the same two for all images; "
        "auto, each image's own lowest and highest.",
    )
    conditioning_fit: OtherShape = option(
        "refuse",
        help="What becomes of a conditioning image of another shape than its image's: refuse makes "
        "a bad row; stretch gives it its image's shape; crop cuts it about its centre.",
    )
    min_image_px: int = option(
        1, help="Leave out rows whose image has a shorter side than this, in pixels."
    )
    conditioning_range: Literal["-1_1", "0_1", "stability_canny"] = option(
        "-1_1",
        help="Range of conditioning pixels before the VAE. -1_1 is what the stock pipeline does "
        "at inference; 0_1 repeats the diffusers training script; stability_canny is for going on "
        "from Stability's Canny ControlNet for SD3.5 large.",
    )
    max_sequence_length: int = option(
        77, help="T5 tokens a prompt; inference uses the same number."
    )
    t5: bool = option(
        True,
        help="Encode prompts by T5 too. Without it, and where the base has none, its embedding is "
        "zeros, as in the stock pipeline.",
    )
    validation_prompt: tuple[str, ...] = option(
        (), help="Prompts of the validation pairs; repeatable.", heading="Validation"
    )
    validation_image: tuple[Path, ...] = option(
        (),
        help="Images of the validation pairs; repeatable: conditioning images, or photographs "
        "that --conditioning-from draws from; for inpainting without it, pictures whose "
        "transparent part is drawn anew. One prompt is used for all images, and one image for all "
        "prompts.",
    )
    validation_image_as_is: bool = option(
        False,
        help="With --conditioning-from: the validation images are conditioning images already; "
        "otherwise these are drawn from them.",
    )
    validation_rows: int = option(
        0,
        help="Number of rows to hold out, chosen by --seed; training measures its loss on them "
        "and does not train on them.",
    )
    estimate: bool = option(
        False,
        help="Print how much memory the run would take, and what would reduce it; encode nothing. "
        "It needs neither data nor weights, only the base model's configurations.",
        heading="Speed and memory",
    )
    vae_batch_size: int | Literal["auto"] = option(
        "auto",
        help="Images encoded at a time; auto: as many as fit the GPU's memory, elsewhere 8. Either "
        "way fewer if memory runs out.",
    )
    text_batch_size: int | Literal["auto"] = option(
        32,
        help="Prompts encoded at a time; auto: as many as fit the GPU's memory, elsewhere 32. "
        "Either way fewer if memory runs out.",
    )
    vae_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", help="Number format in which the VAE computes."
    )
    text_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float16", help="Number format in which the text encoders compute."
    )
    offload: Literal["auto", "none", "groups"] = option(
        "auto",
        help="groups: T5's layers stay in host memory and visit the device one by one, for small "
        "cards; best with large batches of prompts. auto: if the text encoders would not fit the "
        "device's free memory.",
    )
    allow_tf32: bool = option(True, help="Use TensorFloat-32 for float32 products on the GPU.")
    dataloader_num_workers: int | None = option(
        None,
        help="Threads that decode and resize images; by default one for each core, 16 at most.",
    )
    device: str | None = option(
        None, help="cuda, cuda:1, mps or cpu; by default the best that is available."
    )
    max_bad_fraction: float = option(
        0.01,
        help="Stop if more than this fraction of the rows, and more than one, cannot be used.",
        heading="Bad rows",
    )
    strict: bool = option(False, help="Stop at the first row that cannot be used.")
    retry_bad_rows: bool = option(
        False,
        help="Try rows again that were left out before, though their files are the same: after "
        "a codec was installed, or for a failure of the device.",
    )
    part: str | None = option(
        None,
        help="i/n: make only part i of n, counted from 0; for separate machines and job arrays.",
        heading="Several machines",
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, before anything is loaded.

        Raises:
            ConfigError: naming the option.
        """
        if re.match(r"[a-z][a-z0-9+.-]*:/", str(self.cache)):
            raise ConfigError(
                f"--cache {self.cache}: precompute writes to a folder of this machine; give one, "
                "and copy it afterwards: python -m shards push FOLDER URL."
            )
        check_resolution(self.resolution)
        check_sequence_length(self.max_sequence_length)
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ConfigError(
                f"--background {self.background}: no colour; try white, or #ffffff."
            ) from error
        self._check_scale()
        self._check_views()
        for name in ("vae_batch_size", "text_batch_size", "dataloader_num_workers"):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise ConfigError(f"{flag(name)} {value}: must be at least 1.")
        if self.buckets and self.resolution % STEP_PX:
            raise ConfigError(
                f"--resolution {self.resolution}: with --buckets it must be a multiple of "
                f"{STEP_PX}; try {max(1, round(self.resolution / STEP_PX)) * STEP_PX}."
            )
        for one, other in (
            ("conditioning_data_dir", "conditioning_from"),
            ("caption_extension", "caption"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ConfigError(f"{flag(one)} and {flag(other)}: give one of them.")
        find_part(self.part, {})
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ConfigError(f"--max-train-samples {self.max_train_samples}: must be at least 1.")
        if self.min_image_px < 1:
            raise ConfigError(f"--min-image-px {self.min_image_px}: must be at least 1.")
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
        self._check_inpainting()
        parse_arguments(self.conditioning_args)
        if self.conditioning_args and self.conditioning_from is None:
            raise ConfigError("--conditioning-args: is for --conditioning-from; give both.")
        if self.validation_image_as_is and self.conditioning_from is None:
            raise ConfigError(
                "--validation-image-as-is: is for --conditioning-from; without it validation "
                "images are conditioning images anyway. Leave it out."
            )
        self.validation_pairs()

    def _check_inpainting(self) -> None:
        given = f"--num-extra-conditioning-channels {self.num_extra_conditioning_channels}"
        if self.num_extra_conditioning_channels not in (0, 1):
            raise ConfigError(f"{given}: 0, or 1 for the mask of inpainting.")
        if self.inpainting and self.conditioning_range != "-1_1":
            raise ConfigError(
                f"{given}: the stock inpainting pipeline takes pixels in -1 to 1; leave out "
                f"--conditioning-range {self.conditioning_range}."
            )
        if self.inpainting and self.conditioning_from == "mask":
            raise ConfigError(
                f"{given}: --conditioning-from mask paints over pictures; strokes draws masks."
            )

    def _check_scale(self) -> None:
        try:
            parse_scale(self.conditioning_scale)
        except ValueError as error:
            raise ConfigError(
                f"--conditioning-scale {self.conditioning_scale}: expected as-is, which takes 8 "
                "bit as they are and of 16 bit the upper 8; auto, each image's own range; or "
                "LOW:HIGH with the lower number first, such as 0:5000."
            ) from error
        for name, default in (("conditioning_scale", AS_IS), ("conditioning_fit", "refuse")):
            if self.conditioning_from is not None and getattr(self, name) != default:
                raise ConfigError(
                    f"{flag(name)} {getattr(self, name)}: is for conditioning images of the data "
                    "set, and --conditioning-from draws them; leave one out."
                )

    def _check_views(self) -> None:
        if self.views < 1:
            raise ConfigError(f"--views {self.views}: must be at least 1, the centre crop.")
        given = f"--crop-scale {self.crop_scale}"
        try:
            least, _ = parse_crop_scale(self.crop_scale)
        except ValueError as error:
            raise ConfigError(
                f"{given}: expected LOW:HIGH, above 0 and up to 1, the lower one first, such as "
                f"{CROP_SCALE}."
            ) from error
        if least == 1:
            raise ConfigError(
                f"{given}: all crops of an image that has the shape of --resolution would be the "
                "same; give a smaller LOW."
            )
        if self.views == 1 and self.crop_scale != CROP_SCALE:
            raise ConfigError(
                f"{given}: is for random crops, and --views 1 keeps the centre crop alone; give "
                "--views 2 or more."
            )

    @property
    def inpainting(self) -> bool:
        """Whether the cache is for inpainting."""
        return self.num_extra_conditioning_channels > 0

    @property
    def images_per_row(self) -> int:
        """How many images each row gives that is trained on: its crops, and their mirrors."""
        return self.views * (2 if self.random_flip else 1)

    @property
    def described_views(self) -> str:
        """The options that say which crops are kept; "" if the centre crops alone are."""
        if self.views == 1:
            return ""
        crops = f"--views {self.views} --crop-scale {self.crop_scale} --seed {self.seed}"
        return f"{crops} --random-flip" if self.random_flip else crops

    @property
    def random_crops(self) -> RandomCrops:
        """How random crops are drawn."""
        return RandomCrops(self.seed, *parse_crop_scale(self.crop_scale))

    @property
    def num_loaders(self) -> int:
        """How many threads decode and resize images."""
        return self.dataloader_num_workers or min(num_cores(), MOST_LOADERS)

    def source_settings(self) -> SourceSettings:
        """Return where the rows come from."""
        return SourceSettings(
            source=self.source,
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            dataset_revision=self.dataset_revision,
            train_data_dir=self.train_data_dir,
            split=self.split,
            image_column=self.image_column,
            conditioning_image_column=self.conditioning_image_column,
            caption_column=self.caption_column,
            caption=self.caption,
            caption_extension=self.caption_extension,
            conditioning_data_dir=self.conditioning_data_dir,
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
