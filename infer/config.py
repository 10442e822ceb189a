"""The settings of stage 3."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.checks import check_resolution, check_sequence_length, pair_up
from shards.errors import ConfigError
from shards.options import option


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What every command that draws pictures needs to know."""

    pretrained_model_name_or_path: str = option(help="Base model: a diffusers folder or a hub id.")
    controlnet: str = option(help="ControlNet: a folder that train wrote, or a hub id.")
    output_dir: Path = option(help="Where the pictures go.")
    negative_prompt: str = option("", help="What not to draw.")
    num_inference_steps: int = option(28, help="Sampling steps.")
    guidance_scale: float = option(7.0, help="Classifier-free guidance; 1 turns it off.")
    controlnet_conditioning_scale: float = option(1.0, help="Strength of the control; 0 is none.")
    resolution: int | None = option(
        None, help="Side of the picture in pixels; what the ControlNet was trained on if absent."
    )
    max_sequence_length: int | None = option(
        None, help="T5 tokens; what the ControlNet was trained on if absent."
    )
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


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(PipelineConfig):
    """Draw pictures from prompts and conditioning images with a ControlNet.

    A picture is what the stock pipeline gives for `generator=torch.manual_seed(seed)`.
    """

    prompt: tuple[str, ...] = option(help="What to draw; repeatable.")
    image: tuple[Path, ...] = option(
        help="Conditioning images; repeatable. One prompt goes with all images, or one image with "
        "all prompts."
    )
    seed: int = option(0, help="Of every picture.")

    def __post_init__(self) -> None:
        """As the base class; and the numbers of prompts and images must go together."""
        super().__post_init__()
        self.pairs()

    def pairs(self) -> list[tuple[str, Path]]:
        """Return the (prompt, conditioning image) pairs to draw.

        Raises:
            ConfigError: the numbers of prompts and images do not go together.
        """
        pairs = pair_up(self.prompt, self.image, "--prompt", "--image")
        if not pairs:
            raise ConfigError("nothing to draw: give --prompt and --image.")
        return pairs


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(PipelineConfig):
    """Measure how well a ControlNet draws circles, beside the base model without it.

    Each row is drawn twice from the same noise. The disc is found in the picture and held against
    its conditioning outline (intersection over union) and its caption's colours (CIEDE2000).
    """

    source: Path = option(
        help="Circles in fill50k's layout, folder or zip; conditioning images and prompts are read."
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
