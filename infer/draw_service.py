"""Draws single pictures on request, for the page: one ControlNet at a time on the device.

A request leaves two files in the output folder: its conditioning image, and its picture with its
settings.
"""

import dataclasses
import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from PIL import Image

from common.device import pick_device, use_device
from common.errors import ConfigError, RunError
from infer.config import GenerateConfig, PipelineConfig, ServeConfig
from infer.drawing import metadata
from infer.drawing.controlnet_set import ControlNetSet, find_controlnet_sets
from infer.drawing.generate import draw
from infer.drawing.pictures import plan_pictures
from infer.drawing.prompts import EncodedPrompts
from infer.drawing.requests import DrawRequest, load_control
from infer.loaded_base import LoadedBase
from infer.photographs import Photograph, Redrawing, draw_controls, find_redrawing
from infer.pipeline import full_memory_explained, with_dtype
from sd3.annotators.drawing import Drawing
from sd3.contact_sheet import save_png

# No drawing needs more; the picture has the model's own size.
LARGEST_SIDE_PX = 4096
NUMBERED = re.compile(r"(\d{5,})(-conditioning)?\.png$")


class DrawService:
    """Draws one picture a call; calls from several threads wait for each other.

    Args:
        config: settings of the page.

    Attributes:
        controlnets: the ControlNets to choose from, by title.
        redrawings: what draws their controls from photographs, by title, of those that say so.
        device: where they draw.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config = with_dtype(config)
        self.device = pick_device(config.device)
        self._base, sets = find_controlnet_sets(config, with_text_encoders=True)
        for controlnets in sets:
            if controlnets.convention.inpainting:
                raise ConfigError(
                    f"--controlnet {controlnets.names[0]}: is for inpainting, and the page draws "
                    "no masks; python -m infer generate takes them."
                )
        self.controlnets = {controlnet.title: controlnet for controlnet in sets}
        self.redrawings = _find_redrawings(config, sets)
        self._drawings: dict[str, Drawing] = {}
        self._loaded: LoadedBase | None = None
        self._pipeline: Any = None
        self._loaded_title: str | None = None
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self._numbers = _free_numbers(config.output_dir)
        self._lock = threading.Lock()
        self._load(sets[0])

    def draw(
        self,
        conditioning: Image.Image,
        prompt: str,
        negative_prompt: str,
        title: str,
        *,
        seed: int,
        num_inference_steps: int,
        guidance_scale: float,
        controlnet_conditioning_scale: float,
        from_photo: bool = False,
    ) -> tuple[Path, Path]:
        """Draw a picture; return its file, and that of its conditioning image.

        Args:
            conditioning: RGB, of any size.
            prompt: what to draw.
            negative_prompt: what not to draw.
            title: title of the ControlNet.
            seed: seed of the noise.
            num_inference_steps: sampling steps.
            guidance_scale: strength of classifier-free guidance.
            controlnet_conditioning_scale: strength of the control.
            from_photo: whether `conditioning` is a photograph, and the conditioning image is drawn
                from it.

        Raises:
            ConfigError: a value is out of bounds.
            RunError: the device's memory is full.
            OSError: the picture cannot be written.
        """
        self._check(conditioning, prompt, seed, num_inference_steps)
        controlnet = self._find_controlnet(title)
        with self._lock:
            use_device(self.device)  # the page's threads come and go
            if from_photo:
                conditioning = self._control_of(conditioning, controlnet)
            number = next(self._numbers)
            drawing = self.config.output_dir / f"{number:05d}-conditioning.png"
            save_png(drawing, conditioning)
            control = load_control(drawing, is_ready=True)
            config = GenerateConfig(
                **_pipeline_settings(self.config)
                | {
                    "controlnet": controlnet.names,
                    # The control is there, drawn by hand or from a photograph.
                    "conditioning_from": None,
                    "conditioning_args": (),
                    "prompt": (prompt,),
                    "negative_prompt": negative_prompt,
                    "image": (drawing,),
                    "seed": (seed,),
                    "num_inference_steps": num_inference_steps,
                    "guidance_scale": guidance_scale,
                    "controlnet_conditioning_scale": (controlnet_conditioning_scale,),
                }
            )
            request = DrawRequest(prompt, negative_prompt, (control,), (seed,))
            path = self.config.output_dir / f"{number:05d}.png"
            self._draw_to_file(path, config, controlnet, request)
            return path, drawing

    def _control_of(self, photograph: Image.Image, controlnet: ControlNetSet) -> Image.Image:
        """Return the conditioning image that is drawn from a photograph, in the picture's size."""
        title = controlnet.title
        if title not in self.redrawings:
            raise ConfigError(
                f"What draws controls from photographs is not known of {title}; start the page "
                "with --conditioning-from."
            )
        if title not in self._drawings:
            self._drawings[title] = self.redrawings[title].open()
        size = controlnet.convention.picture_size(photograph)
        named = Photograph("The photograph", photograph, size)
        (control,) = draw_controls(self._drawings[title], [named])
        return control

    def _check(self, conditioning: Image.Image, prompt: str, seed: int, num_steps: int) -> None:
        if not prompt.strip():
            raise ConfigError("Say in the prompt what to draw.")
        if max(conditioning.size) > LARGEST_SIDE_PX:
            width, height = conditioning.size
            raise ConfigError(
                f"The image has {width} x {height} pixels; {LARGEST_SIDE_PX} at most."
            )
        if not 1 <= num_steps <= self.config.most_steps:
            raise ConfigError(f"{num_steps} steps: 1 to {self.config.most_steps}.")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"Seed {seed}: 0 to {2**63 - 1}.")

    def _find_controlnet(self, title: str) -> ControlNetSet:
        if title not in self.controlnets:
            raise ConfigError(f"no ControlNet {title!r}; there are {', '.join(self.controlnets)}.")
        return self.controlnets[title]

    def _draw_to_file(
        self, path: Path, config: GenerateConfig, controlnet: ControlNetSet, request: DrawRequest
    ) -> None:
        (picture,) = plan_pictures(config, controlnet, [request], title_in_name=False)
        try:
            with full_memory_explained(self.config):
                self._load(controlnet)
                (image,) = draw(self._pipeline, [picture], controlnet, EncodedPrompts(), config)
        except RunError:
            self._loaded = self._pipeline = self._loaded_title = None
            raise
        save_png(path, image, metadata.png_info(picture.description))

    def _load(self, controlnet: ControlNetSet) -> None:
        """Load a ControlNet, unless it is loaded, and at first the base model."""
        if self._loaded_title == controlnet.title:
            return
        self._pipeline, self._loaded_title = None, None  # frees its memory first
        if self._loaded is None:
            sets = [one.folders for one in self.controlnets.values()]
            self._loaded = LoadedBase(self.config, self._base, sets, batch_size=1)
        self._pipeline = self._loaded.with_controlnets(controlnet.folders)
        self._pipeline.set_progress_bar_config(disable=True)
        self._loaded_title = controlnet.title


def _find_redrawings(config: ServeConfig, sets: Sequence[ControlNetSet]) -> dict[str, Redrawing]:
    """Return what draws controls from photographs, by title of the ControlNets that say so."""
    found = {}
    for controlnet in sets:
        convention = controlnet.convention
        if config.conditioning_from is not None or convention.annotator is not None:
            try:
                found[controlnet.title] = find_redrawing(config, controlnet.names[0], convention)
            except ConfigError as error:
                if config.conditioning_from is not None:
                    raise
                click.echo(f"no controls from photographs: {error}", err=True)
    return found


def _free_numbers(folder: Path) -> Iterator[int]:
    """Return numbers for new files, without end: those after the largest one in a folder."""
    matches = (NUMBERED.match(path.name) for path in folder.glob("*.png"))
    taken = [int(match[1]) for match in matches if match]
    return itertools.count(1 + max(taken, default=0))


def _pipeline_settings(config: PipelineConfig) -> dict[str, Any]:
    """Return the settings that every command that draws has."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(PipelineConfig)}
