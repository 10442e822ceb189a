"""The settings of stage 3."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.checks import check_resolution, check_sequence_length
from common.errors import ConfigError
from common.options import option
from shards.format.manifest import DEFAULT_CONDITIONING


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What every command that draws pictures needs to know."""

    pretrained_model_name_or_path: str = option(help="Base model: a diffusers folder or a hub id.")
    controlnet: tuple[str, ...] = option(
        help="ControlNet: a folder that train wrote, or a hub id. Repeatable: side by side."
    )
    output_dir: Path = option(help="Where the pictures go.")
    negative_prompt: str = option("", help="What not to draw.")
    num_inference_steps: int = option(28, help="Sampling steps.")
    guidance_scale: float = option(7.0, help="Classifier-free guidance; 1 turns it off.")
    controlnet_conditioning_scale: float = option(1.0, help="Strength of the control; 0 is none.")
    resolution: int | None = option(
        None,
        help="Side of a square picture; what the ControlNet was trained on if absent.",
    )
    height: int | None = option(None, help="Of the picture in pixels, with --width.")
    width: int | None = option(None, help="Likewise, with --height.")
    control_guidance_start: float = option(0.0, help="Where in the steps the control begins, 0-1.")
    control_guidance_end: float = option(1.0, help="Where in the steps the control ends, 0 to 1.")
    shift: float | None = option(None, help="Of the noise schedule; the base's own if absent.")
    max_sequence_length: int | None = option(
        None, help="T5 tokens; what the ControlNet was trained on if absent."
    )
    convention: Literal["saved", "train_controlnet_sd3"] = option(
        "saved",
        help="How the ControlNet wants to be driven: as its configuration says, or as diffusers' "
        "script trains, which it does not say.",
    )
    quantize_base: Literal["int8", "fp8", "nf4"] | None = option(
        None, help="The transformer in 8 or 4 bit (NF4), which needs the extra [bitsandbytes]."
    )
    offload: Literal["auto", "none", "model", "sequential"] = option(
        "auto",
        help="Keep models in host memory and bring them to the device in turn, whole or layer by "
        "layer; as the memory there demands if auto.",
    )
    vae_tiling: bool = option(False, help="Decode in tiles: less memory, faint seams.")
    compile: bool = option(False, help="Compile the networks' blocks; for many pictures.")
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    cache_dir: Path | None = option(None, help="Where downloaded models are kept.")
    dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", help="Number format of all weights."
    )
    device: str | None = option(None, help="cuda, cuda:1, mps or cpu; the best there is if absent.")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded.

        Raises:
            ConfigError: naming the option.
        """
        if self.num_inference_steps < 1:
            raise ConfigError(f"--num-inference-steps {self.num_inference_steps}: at least 1.")
        if self.resolution is not None:
            check_resolution(self.resolution)
        if self.max_sequence_length is not None:
            check_sequence_length(self.max_sequence_length)
        if not self.controlnet:
            raise ConfigError("--controlnet: give at least one.")
        if (self.height is None) != (self.width is None):
            raise ConfigError("--height and --width: give both or neither.")
        if self.height is not None and self.resolution is not None:
            raise ConfigError("--resolution: give it, or --height and --width.")
        for flag, side in (("--height", self.height), ("--width", self.width)):
            if side is not None:
                check_resolution(side, flag)
        if not 0 <= self.control_guidance_start < self.control_guidance_end <= 1:
            raise ConfigError(
                f"--control-guidance-start {self.control_guidance_start:g} and --control-guidance-"
                f"end {self.control_guidance_end:g}: between 0 and 1, the start before the end."
            )
        if self.shift is not None and self.shift <= 0:
            raise ConfigError(f"--shift {self.shift:g}: must be above 0.")
        if self.offload == "sequential" and self.quantize_base is not None:
            raise ConfigError("--offload sequential: does not go with --quantize-base; try model.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PipelineConfig):
    """Draw pictures from prompts and conditioning images with a ControlNet.

    A picture is what the stock pipeline gives for `generator=torch.manual_seed(seed)`.
    """

    combine: bool = option(False, help="Have all of them draw every picture together.")
    prompt: tuple[str, ...] = option((), help="What to draw; repeatable.")
    image: tuple[Path, ...] = option(
        (),
        help="Conditioning images; repeatable. One prompt goes with all images, or one image with "
        "all prompts; with --combine, one for each ControlNet in turn.",
    )
    pairs: Path | None = option(
        None,
        help="Prompts and images from a file, TOML or JSON lines, or from a folder of images, each "
        "with a .txt beside it.",
    )
    cache: str | None = option(
        None,
        help="A cache: prompts that it knows need no text encoder; and where no others are given, "
        "its validation pairs are drawn.",
    )
    conditioning_name: str = option(
        DEFAULT_CONDITIONING, help="Which control of the cache its validation pairs are of."
    )
    seed: tuple[int, ...] = option((0,), help="Of every picture; of several each draws its own.")
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
        if self.pairs is None and not (self.prompt and self.image) and not self._draws_validation:
            raise ConfigError(
                "nothing to draw: give --prompt and --image, --pairs, or --cache alone."
            )
        if not self.seed:
            raise ConfigError("--seed: give at least one.")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: at least 1.")

    @property
    def _draws_validation(self) -> bool:
        return self.cache is not None and not (self.prompt or self.image or self.pairs)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PipelineConfig):
    """Measure how well ControlNets do, side by side and beside the base model without one.

    Each row is drawn each way from the same noise. Circles: the disc is found in the picture and
    held against its conditioning outline (intersection over union) and its caption's colours
    (CIEDE2000). Edges: Canny's of the picture against a conditioning image of lines (precision,
    recall). Targets: the picture against the row's own image (PSNR, SSIM).
    """

    source: Path = option(
        help="fill50k's layout, folder or zip, or a folder that the datasets library loads."
    )
    measure: tuple[Literal["circles", "edges", "targets"], ...] = option(
        (), help="What to measure; what goes with the first row if absent. Repeatable."
    )
    num_samples: int = option(100, help="The source's first so many rows, or as many as it has.")
    batch_size: int = option(20, help="Pictures drawn at a time.")
    seed: int = option(0, help="Of the first row's noise; the next row has the next seed.")
    json: Path | None = option(
        None, help="File for the figures; score.json in the output folder if absent."
    )

    def __post_init__(self) -> None:
        """As the base class; and the counts must be positive."""
        super().__post_init__()
        for flag, count in (
            ("--num-samples", self.num_samples),
            ("--batch-size", self.batch_size),
        ):
            if count < 1:
                raise ConfigError(f"{flag} {count}: at least 1.")

    @property
    def json_path(self) -> Path:
        """Where the figures go."""
        return self.json or self.output_dir / "score.json"


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decode the validation pictures of a run that kept their latents.

    Each becomes a PNG beside its file: the conditioning image, then what came of it.
    """

    pretrained_model_name_or_path: str = option(
        help="Base model: a diffusers folder or a hub id; only its VAE is read."
    )
    output_dir: Path = option(help="The run's folder, as given to train.")
    revision: str | None = option(None, help="Revision of the base model on the hub.")
    variant: str | None = option(None, help="Variant of the base model's weight files, e.g. fp16.")
    cache_dir: Path | None = option(None, help="Where downloaded models are kept.")
    device: str | None = option(None, help="cuda, cuda:1, mps or cpu; the best there is if absent.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PipelineConfig):
    """Serve a page on which to draw or upload a conditioning image and have it followed.

    Pictures and the drawings that they follow are kept in the output folder.
    """

    host: str = option("127.0.0.1", help="Address to listen on; 0.0.0.0 lets others in.")
    port: int = option(7860, help="To listen on.")
    most_waiting: int = option(16, help="Requests in the queue; further ones are turned away.")
    most_upload_mb: int = option(20, help="Size of an uploaded image, in 10^6 bytes.")
    most_steps: int = option(100, help="Sampling steps that may be asked for.")

    def __post_init__(self) -> None:
        """As the base class; and the limits must be positive."""
        super().__post_init__()
        for name in ("port", "most_waiting", "most_upload_mb", "most_steps"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} {getattr(self, name)}: at least 1.")
        if self.num_inference_steps > self.most_steps:
            raise ConfigError(
                f"--num-inference-steps {self.num_inference_steps}: --most-steps is "
                f"{self.most_steps}."
            )
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: at most 65535.")
