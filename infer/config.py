"""The settings of stage 3."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.checks import check_resolution, check_sequence_length, for_each
from common.errors import ConfigError
from common.options import flag, option
from sd3.annotators.arguments import parse_arguments
from sd3.controlnet.unsaved_convention import ConfigConvention
from sd3.images import OtherShape
from shards.format.manifest import DEFAULT_CONDITIONING

Offload = Literal["none", "model", "groups"]
# Settings that ControlNets which draw together may each have their own of.
PER_CONTROLNET = (
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What every command that draws pictures needs to know."""

    controlnet: tuple[str, ...] = option(
        help="ControlNet: a folder that train wrote, a checkpoint's too, or a hub id. Repeatable: "
        "side by side.",
        heading="ControlNet",
        unless="estimate",
    )
    controlnet_conditioning_scale: tuple[float, ...] = option(
        (1.0,),
        help="Strength of the control; 0 is none. For ControlNets that are combined one for all, "
        "or one for each.",
    )
    control_guidance_start: tuple[float, ...] = option(
        (0.0,), help="Fraction of the steps after which the control begins; likewise."
    )
    control_guidance_end: tuple[float, ...] = option(
        (1.0,), help="Fraction of the steps after which the control ends; likewise."
    )
    convention: ConfigConvention = option(
        "saved",
        help="Inputs that the ControlNet expects: as its configuration says, or as diffusers' "
        "script trains it or Stability's Canny was trained, whose configurations leave it out.",
    )
    conditioning_from: str | None = option(
        None,
        help="What draws controls from photographs, as for precompute; by default what drew those "
        "of the ControlNet's training.",
    )
    conditioning_args: tuple[str, ...] = option(
        (), help="key=value, an argument of what draws controls from photographs; repeatable."
    )
    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder, a hub id or a .safetensors file.",
        heading="Base model",
    )
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    single_file_config: str | None = option(
        None,
        help="Of a one-file base: folder or hub id of the configurations, tokenizers and whatever "
        "else it lacks; by default the published model of its kind.",
    )
    transformer: Path | None = option(
        None,
        help="A .safetensors file whose transformer takes the place of the base's, e.g. a "
        "fine-tune's.",
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
        None, help="Folder for downloaded models; not the cache of shards."
    )
    output_dir: Path = option(help="Folder for the pictures.", heading="Output", unless="estimate")
    num_inference_steps: int = option(28, help="Sampling steps.", heading="Sampling")
    guidance_scale: float = option(7.0, help="Classifier-free guidance; 1 turns it off.")
    negative_prompt: str = option("", help="What not to draw.")
    resolution: int | None = option(
        None,
        help="Side of a square picture in pixels; by default that of the ControlNet's training.",
    )
    height: int | None = option(None, help="Height of the picture in pixels; needs --width.")
    width: int | None = option(None, help="Width of the picture in pixels; needs --height.")
    max_sequence_length: int | None = option(
        None, help="T5 tokens per prompt; by default those of the ControlNet's training."
    )
    t5: bool = option(
        True,
        help="Encode prompts by T5 too. Without it, and where the base has none, its embedding is "
        "zeros, as in the stock pipeline.",
    )
    shift: float | None = option(
        None, help="Shift of the noise schedule; by default the base's own."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = option(
        "auto",
        help="Number format of the weights; auto is bfloat16 on a GPU and float32 elsewhere.",
        heading="Speed and memory",
    )
    device: str | None = option(
        None, help="cuda, cuda:1, mps or cpu; by default the best that is available."
    )
    offload: Literal["auto", "none", "model", "groups"] = option(
        "auto",
        help="Keep models in host memory and bring them to the device when needed: T5 layer by "
        "layer and the others whole (model), or transformer and ControlNet block by block too "
        "(groups); auto takes the first of none, model and groups that fits.",
    )
    quantize_base: Literal["int8", "fp8", "nf4"] | None = option(
        None, help="Store the transformer in 8 or 4 bit; nf4 needs the extra [bitsandbytes]."
    )
    vae_tiling: bool = option(False, help="Decode in tiles of 512 px: less memory, faint seams.")
    compile: bool = option(False, help="Compile the networks' blocks; pays off for many pictures.")
    estimate: bool = option(
        False,
        help="Print how much memory drawing will take, and stop. It needs the base's "
        "configurations alone.",
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot work, before anything is loaded.

        Raises:
            ConfigError: naming the option.
        """
        parse_arguments(self.conditioning_args)
        if self.num_inference_steps < 1:
            raise ConfigError(f"--num-inference-steps {self.num_inference_steps}: at least 1.")
        if self.resolution is not None:
            check_resolution(self.resolution)
        if self.max_sequence_length is not None:
            check_sequence_length(self.max_sequence_length)
        if not self.controlnet and not self.estimate:
            raise ConfigError("--controlnet: give at least one.")
        if (self.height is None) != (self.width is None):
            raise ConfigError("--height and --width: give both or neither.")
        if self.height is not None and self.resolution is not None:
            raise ConfigError("--resolution: give it, or --height and --width.")
        for name in ("height", "width"):
            side = getattr(self, name)
            if side is not None:
                check_resolution(side, flag(name))
        self._check_guidance()
        if self.shift is not None and self.shift <= 0:
            raise ConfigError(f"--shift {self.shift:g}: must be above 0.")
        if self.offload == "groups" and self.compile:
            raise ConfigError("--offload groups: does not go with --compile; try model.")

    def _check_guidance(self) -> None:
        count = self.num_combined
        for name in PER_CONTROLNET:
            if len(given := getattr(self, name)) not in (1, count):
                several = f", or {count}, one for each" if count > 1 else ""
                raise ConfigError(f"{flag(name)}: {len(given)} values; give one{several}.")
        starts, ends = (
            for_each(getattr(self, name), count) for name in PER_CONTROLNET if "guidance" in name
        )
        for start, end in zip(starts, ends, strict=True):
            if not 0 <= start < end <= 1:
                raise ConfigError(
                    f"--control-guidance-start {start:g} and --control-guidance-end {end:g}: "
                    "between 0 and 1, the start before the end."
                )

    @property
    def num_combined(self) -> int:
        """How many ControlNets draw a picture together."""
        return 1


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PipelineConfig):
    """Draw pictures from prompts and conditioning images with a ControlNet.

    A picture is what the stock pipeline gives for `generator=torch.manual_seed(seed)`.
    """

    prompt: tuple[str, ...] = option(
        (), help="Prompt of a picture; repeatable.", heading="What to draw"
    )
    image: tuple[Path, ...] = option(
        (),
        help="Conditioning images; repeatable. One prompt is used for all images, and one image "
        "for all prompts. With --combine, one image per ControlNet in turn.",
    )
    mask: tuple[Path, ...] = option(
        (),
        help="For a ControlNet for inpainting: masks, white where the pictures of --image are to "
        "be drawn anew; repeatable, one for each image or one for all. Without, it is what is "
        "transparent of them.",
    )
    from_photo: bool = option(
        False,
        help="The images are photographs: conditioning images are drawn from them as for the "
        "ControlNet's training.",
    )
    pairs: Path | None = option(
        None,
        help="Prompts and images: a TOML or JSON lines file, or a folder of images, each with a "
        ".txt beside it.",
    )
    cache: str | None = option(
        None,
        help="A cache: its prompts need no text encoder, and its validation pairs are drawn if "
        "nothing else is given.",
        aliases=("shards",),
    )
    conditioning_name: str = option(
        DEFAULT_CONDITIONING, help="Which of the cache's controls has the validation pairs."
    )
    seed: tuple[int, ...] = option(
        (0,), help="Seed of every picture; repeatable: each seed draws its own picture."
    )
    combine: bool = option(
        False, help="Let all ControlNets act on every picture together, instead of side by side."
    )
    batch_size: int = option(1, help="Pictures drawn at a time.")

    def __post_init__(self) -> None:
        """As the base class; and what is given must go together.

        Raises:
            ConfigError: naming the option.
        """
        super().__post_init__()
        if self.combine and len(self.controlnet) < 2:
            raise ConfigError("--combine: give --controlnet twice or more.")
        given = [bool(self.prompt or self.image), self.pairs is not None]
        if all(given):
            raise ConfigError("--pairs: give it, or --prompt and --image.")
        something = self.pairs is not None or (self.prompt and self.image)
        if not (something or self._draws_validation or self.estimate):
            raise ConfigError(
                "nothing to draw: give --prompt and --image, --pairs, or --cache alone."
            )
        if self.mask and len(self.mask) not in (1, len(self.image)):
            raise ConfigError(
                f"{len(self.mask)} --mask and {len(self.image)} --image: give one mask for each "
                "image, or one for all."
            )
        if self.from_photo and self._draws_validation:
            raise ConfigError(
                "--from-photo: the cache's validation pairs have conditioning images; give --image "
                "or --pairs, or leave it out."
            )
        if not self.from_photo:
            for name in ("conditioning_from", "conditioning_args"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{flag(name)}: says how controls are drawn from photographs; add "
                        "--from-photo, or leave it out if the images are conditioning images."
                    )
        if not self.seed:
            raise ConfigError("--seed: give at least one.")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: at least 1.")

    @property
    def num_combined(self) -> int:
        """How many ControlNets draw a picture together."""
        return len(self.controlnet) if self.combine else 1

    @property
    def _draws_validation(self) -> bool:
        return self.cache is not None and not (self.prompt or self.image or self.pairs)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PipelineConfig):
    """Measure how well ControlNets do, side by side and beside the base model without one.

    Each row is drawn with each ControlNet and without one, from the same noise. Circles: finds the
    disc in the picture and compares it with its conditioning outline (intersection over union) and
    with its caption's colours (CIEDE2000, 0 is exact). Edges: compares the picture's Canny edges
    with a conditioning image of lines (precision, recall). Targets: compares the picture with the
    row's own image (PSNR, SSIM). Redrawn: draws the control again, from the picture, and compares
    it with the conditioning image (PSNR, SSIM).
    """

    source: Path = option(
        help="Data set on the disk with conditioning images, in any layout that precompute reads.",
        heading="What to measure",
        unless="estimate",
    )
    from_photo: bool = option(
        False,
        help="Draw the conditioning images from the rows' images, as for the ControlNet's "
        "training.",
    )
    conditioning_fit: OtherShape = option(
        "refuse",
        help="What becomes of a conditioning image of another shape than its image's, as in "
        "precompute: refuse, stretch or crop.",
    )
    measure: tuple[Literal["circles", "edges", "targets", "redrawn"], ...] = option(
        (), help="What to measure; by default what suits the first row. Repeatable."
    )
    num_samples: int = option(100, help="Number of rows, from the source's first on.")
    seed: int = option(0, help="Seed of the first row's noise; each next row has the next seed.")
    json: Path | None = option(
        None,
        help="File for the figures; by default score.json in the output folder.",
    )
    batch_size: int = option(20, help="Pictures drawn at a time.")

    def __post_init__(self) -> None:
        """As the base class; and the counts must be positive."""
        super().__post_init__()
        for name in ("num_samples", "batch_size"):
            count = getattr(self, name)
            if count < 1:
                raise ConfigError(f"{flag(name)} {count}: at least 1.")

    @property
    def json_path(self) -> Path:
        """Where the figures go."""
        return self.json or self.output_dir / "score.json"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decode the validation pictures of a run that kept their latents.

    Each becomes a PNG beside its file: the conditioning image and the picture.
    """

    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder, a hub id or a .safetensors file; only its VAE "
        "is read.",
        heading="Base model",
    )
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    single_file_config: str | None = option(
        None,
        help="Of a one-file base: folder or hub id of the configurations, tokenizers and whatever "
        "else it lacks; by default the published model of its kind.",
    )
    cache_dir: Path | None = option(
        None, help="Folder for downloaded models; not the cache of shards."
    )
    output_dir: Path = option(help="The run's folder, as given to train.", heading="Output")
    device: str | None = option(
        None,
        help="cuda, cuda:1, mps or cpu; by default the best that is available.",
        heading="Speed and memory",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a ControlNet as one file for ComfyUI, which goes into its folder models/controlnet.

    It is checked that ComfyUI drives it as it was trained.
    """

    controlnet: str = option(
        help="ControlNet: a folder that train wrote, a checkpoint's too, or a hub id.",
        heading="ControlNet",
    )
    convention: ConfigConvention = option(
        "saved",
        help="How it was trained: as its configuration says, or as diffusers' script trains, which "
        "the configuration leaves out.",
    )
    cache_dir: Path | None = option(
        None, help="Folder for downloaded models; not the cache of shards."
    )
    output: Path = option(help="The file, NAME.safetensors.", heading="Output")
    dtype: Literal["float16", "bfloat16", "float32", "float8_e4m3fn"] = option(
        "float16", help="Number format of the weights; of 8 bit are the blocks' matrices alone."
    )
    overwrite: bool = option(False, help="Replace a file that is there.")

    def __post_init__(self) -> None:
        """Refuse a name that ComfyUI does not take for a model.

        Raises:
            ConfigError: naming the option.
        """
        if self.output.suffix != ".safetensors":
            raise ConfigError(f"--output {self.output}: give a name that ends with .safetensors.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PipelineConfig):
    """Serve a page where you draw or upload a conditioning image and the ControlNet follows it.

    Pictures and their conditioning images are kept in the output folder.
    """

    host: str = option(
        "127.0.0.1", help="Address to listen on; 0.0.0.0 lets others in.", heading="Server"
    )
    port: int = option(7860, help="Port to listen on.")
    most_waiting: int = option(16, help="Requests in the queue at most; further ones are refused.")
    most_upload_mb: int = option(20, help="Size of an uploaded image at most, in 10^6 bytes.")
    most_steps: int = option(100, help="Sampling steps at most.")

    def __post_init__(self) -> None:
        """As the base class; and the limits must be positive."""
        super().__post_init__()
        for name in ("port", "most_waiting", "most_upload_mb", "most_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: at least 1.")
        if self.num_inference_steps > self.most_steps:
            raise ConfigError(
                f"--num-inference-steps {self.num_inference_steps}: --most-steps is "
                f"{self.most_steps}."
            )
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: at most 65535.")
