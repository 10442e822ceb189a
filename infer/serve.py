"""A page on which to draw or upload a conditioning image and have ControlNets follow it.

Each request leaves its conditioning image and its picture, with its settings, in the output folder.
"""

import dataclasses
import itertools
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read as gradio is imported

import click
import gradio as gr
import numpy as np
import torch
from PIL import Image
from xxhash import xxh3_128_hexdigest

from common.errors import ConfigError, RunError, ShardError
from common.provenance import write_run
from infer.config import GenerateConfig, PipelineConfig, ServeConfig
from infer.drawing import metadata
from infer.drawing.generate import Column, draw, find_columns, pictures_of
from infer.drawing.requests import Control, DrawRequest
from infer.pipeline import Convention, load_pipeline
from sd3.contact_sheet import save_png

# Nobody draws larger; the model's own size is what counts.
LARGEST_SIDE_PX = 4096
LEAST_CANVAS_PX = 512
CLEANED_S = 24 * 60 * 60  # gradio's own copies of pictures
MOST_GUIDANCE, MOST_STRENGTH = 15.0, 2.0
NUMBERED = re.compile(r"(\d{5,})(-conditioning)?\.png$")
CSS = "footer {visibility: hidden}"


class Studio:
    """Draws what is asked for, with one ControlNet at a time on the device.

    Args:
        config: of the page.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.base, columns = find_columns(config, encodes=True)
        self.columns = {column.title: column for column in columns}
        self._pipeline: Any = None
        self._loaded: str | None = None
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self._numbers = self._free_numbers()
        self._busy = threading.Lock()
        self._load(columns[0])

    def _column(self, title: str) -> Column:
        """Return a ControlNet by its title.

        Raises:
            ConfigError: there is none of that title.
        """
        if title not in self.columns:
            raise ConfigError(f"no ControlNet {title!r}; there are {', '.join(self.columns)}.")
        return self.columns[title]

    def _load(self, column: Column) -> None:
        """Have the pipeline that a ControlNet draws with at hand."""
        if self._loaded != column.title:
            self._pipeline, self._loaded = None, None  # room first
            self._pipeline = load_pipeline(self.config, self.base, column.folders)
            self._pipeline.set_progress_bar_config(disable=True)
            self._loaded = column.title

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
    ) -> Path:
        """Draw a picture; return its file.

        Args:
            conditioning: RGB, of any size.
            prompt: what to draw.
            negative_prompt: what not to draw.
            title: of the ControlNet.
            seed: of the noise.
            num_inference_steps: sampling steps.
            guidance_scale: of classifier-free guidance.
            controlnet_conditioning_scale: strength of the control.

        Raises:
            ConfigError: something of it is out of bounds.
            RunError: the device's memory is full.
            OSError: the picture cannot be written.
        """
        if not prompt.strip():
            raise ConfigError("Say in the prompt what to draw.")
        if max(conditioning.size) > LARGEST_SIDE_PX:
            width, height = conditioning.size
            raise ConfigError(
                f"The image has {width} x {height} pixels; {LARGEST_SIDE_PX} at most."
            )
        if not 1 <= num_inference_steps <= self.config.most_steps:
            raise ConfigError(f"{num_inference_steps} steps: 1 to {self.config.most_steps}.")
        if not 0 <= seed < 2**63:
            raise ConfigError(f"Seed {seed}: 0 to {2**63 - 1}.")
        column = self._column(title)
        with self._busy:
            number = next(self._numbers)
            drawing = self.config.output_dir / f"{number:05d}-conditioning.png"
            save_png(drawing, conditioning)
            control = Control(drawing, xxh3_128_hexdigest(drawing.read_bytes()), conditioning)
            config = GenerateConfig(
                **_shared(self.config)
                | {
                    "controlnet": column.names,
                    "prompt": (prompt,),
                    "negative_prompt": negative_prompt,
                    "image": (drawing,),
                    "seed": (seed,),
                    "num_inference_steps": num_inference_steps,
                    "guidance_scale": guidance_scale,
                    "controlnet_conditioning_scale": controlnet_conditioning_scale,
                }
            )
            wanted = DrawRequest(prompt, negative_prompt, (control,), (seed,))
            (picture,) = pictures_of(config, column, [wanted], 1)
            try:
                self._load(column)
                (drawn,) = draw(self._pipeline, [picture], column, None, config)
            except torch.OutOfMemoryError as error:
                self._pipeline, self._loaded = None, None
                raise RunError(
                    "Out of memory. Starting the page with --offload model, --quantize-base int8 "
                    "or --dtype bfloat16 helps."
                ) from error
            path = self.config.output_dir / f"{number:05d}.png"
            save_png(path, drawn, metadata.info(picture.about))
            return path

    def _free_numbers(self) -> Iterator[int]:
        names = (path.name for path in self.config.output_dir.glob("*.png"))
        taken = [int(found[1]) for name in names if (found := NUMBERED.match(name))]
        return itertools.count(1 + max(taken, default=0))


def _shared(config: PipelineConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(PipelineConfig)}


def canvas_size(convention: Convention) -> tuple[int, int]:
    """Return the size to draw in: a picture's, or as many times that as a hand needs."""
    width, height = min(convention.sizes, key=lambda size: max(size) / min(size))
    times = -(-LEAST_CANVAS_PX // max(width, height))
    return width * times, height * times


def page(studio: Studio) -> gr.Blocks:
    """Return the page."""
    config = studio.config
    width, height = canvas_size(next(iter(studio.columns.values())).convention)
    titles = list(studio.columns)

    def on_draw(
        editor: dict[str, Any] | None,
        prompt: str,
        negative_prompt: str,
        title: str,
        seed: float | None,
        steps: float,
        guidance: float,
        scale: float,
        shown: list[tuple[str, str]] | None,
    ) -> list[tuple[Any, str]]:
        try:
            path = studio.draw(
                _flattened(editor),
                prompt,
                negative_prompt,
                title,
                seed=int(seed or 0),
                num_inference_steps=int(steps),
                guidance_scale=float(guidance),
                controlnet_conditioning_scale=float(scale),
            )
        except (ConfigError, RunError, ShardError) as error:
            raise gr.Error(str(error)) from error
        except OSError as error:
            raise gr.Error(f"The picture cannot be kept: {error.strerror or error}.") from error
        about = f"{prompt}. {title}, seed {int(seed or 0)}, {int(steps)} steps, "
        # What is sent is the picture alone: its file also says where on this machine things are.
        with Image.open(path) as picture:
            alone = Image.fromarray(np.asarray(picture))
        return [(alone, f"{about}guidance {guidance:g}, strength {scale:g}"), *(shown or [])]

    # Lines are light on black, as outlines, Canny and HED are.
    black = Image.new("RGB", (width, height))
    with gr.Blocks(
        title="SD3 ControlNet", analytics_enabled=False, delete_cache=(CLEANED_S, CLEANED_S)
    ) as blocks:
        gr.Markdown("## Draw, and have it followed")
        # Over the whole width: beside something else the editor puts its canvas out of place.
        editor = gr.ImageEditor(
            value={"background": black, "layers": [], "composite": black},
            type="pil",
            image_mode="RGB",
            sources=("upload", "clipboard"),
            label="Conditioning image",
            brush=gr.Brush(
                default_size=max(2, width // 100),
                colors=["#ffffff", "#000000"],
                default_color="#ffffff",
                color_mode="fixed",
            ),
            layers=False,
            transforms=(),
            canvas_size=(width, height),
            format="png",
            elem_id="conditioning",
        )
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt", elem_id="prompt")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                title = gr.Dropdown(titles, value=titles[0], label="ControlNet")
                scale = gr.Slider(
                    0,
                    max(MOST_STRENGTH, config.controlnet_conditioning_scale),
                    config.controlnet_conditioning_scale,
                    step=0.05,
                    label="Strength",
                )
                negative = gr.Textbox(label="Negative prompt", value=config.negative_prompt)
                guidance = gr.Slider(
                    min(1.0, config.guidance_scale),
                    max(MOST_GUIDANCE, config.guidance_scale),
                    config.guidance_scale,
                    step=0.5,
                    label="Guidance",
                )
                steps = gr.Slider(
                    1, config.most_steps, config.num_inference_steps, step=1, label="Steps"
                )
                seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
            gallery = gr.Gallery(
                label="Pictures",
                columns=2,
                fit_columns=False,
                object_fit="contain",
                height=640,
                format="png",
                interactive=False,
                elem_id="pictures",
            )
        button.click(
            on_draw,
            [editor, prompt, negative, title, seed, steps, guidance, scale, gallery],
            gallery,
            concurrency_limit=1,
            api_name="draw",
        )
    return blocks


def _flattened(editor: dict[str, Any] | None) -> Image.Image:
    """Return what the editor shows, transparent parts black.

    Raises:
        ConfigError: nothing.
    """
    image = (editor or {}).get("composite")
    if image is None:
        raise ConfigError("Draw or upload a conditioning image.")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB")


def serve(config: ServeConfig, *, blocks_thread: bool = True) -> gr.Blocks:
    """Serve the page until interrupted.

    Args:
        config: of the page.
        blocks_thread: whether to stay until then, or return at once.

    Raises:
        ConfigError: base model and ControlNets do not go together, or the port is taken.
        OSError: the output folder cannot be made.
    """
    studio = Studio(config)
    write_run(config.output_dir, "serve", config)
    blocks = page(studio)
    # All goes through the queue, by the page or not.
    blocks.queue(max_size=config.most_waiting, default_concurrency_limit=1, api_open=False)
    try:
        blocks.launch(
            server_name=config.host,
            server_port=config.port,
            max_file_size=f"{config.most_upload_mb}mb",
            footer_links=[],
            css=CSS,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: cannot listen there ({error})."
        ) from error
    click.echo(
        f"http://{config.host}:{config.port}, pictures in {config.output_dir}; Ctrl-C ends it"
    )
    if blocks_thread:
        blocks.block_thread()
    return blocks
