"""The settings of stage 3."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shards.checks import check_resolution, check_sequence_length, pair_up
from shards.errors import ConfigError
from shards.options import option


@dataclass(frozen=True)
class GenerateConfig:
    """Draw pictures from prompts and conditioning images with a ControlNet.

    A picture is what the stock pipeline gives for `generator=torch.manual_seed(seed)`.
    """

    pretrained_model_name_or_path: str = option(help="Base model: a diffusers folder or a hub id.")
    controlnet: str = option(help="ControlNet: a folder that train wrote, or a hub id.")
    output_dir: Path = option(help="Where the pictures go.")
    prompt: tuple[str, ...] = option(help="What to draw; repeatable.")
    image: tuple[Path, ...] = option(
        help="Conditioning images; repeatable. One prompt goes with all images, or one image with "
        "all prompts."
    )
    negative_prompt: str = option("", help="What not to draw.")
    seed: int = option(0, help="Of every picture.")
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
