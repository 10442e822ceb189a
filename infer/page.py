"""The layout of the page on which to draw a conditioning image, and its button's action."""

from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from common.errors import ConfigError, RunError, ShardError
from infer.config import ServeConfig
from infer.convention import Convention
from infer.draw_service import DrawService
from sd3.images import BACKGROUND

SMALLEST_CANVAS_PX = 512
UPLOADS_KEPT_S = 24 * 60 * 60  # gradio's own copies of pictures
MOST_GUIDANCE, MOST_STRENGTH = 15.0, 2.0


def build_page(service: DrawService) -> gr.Blocks:
    """Return the page, ready to be launched."""
    config, titles = service.config, list(service.controlnets)
    width, height = canvas_size(service.controlnets[titles[0]].convention)
    with gr.Blocks(
        title="SD3 ControlNet",
        analytics_enabled=False,
        delete_cache=(UPLOADS_KEPT_S, UPLOADS_KEPT_S),
    ) as page:
        gr.Markdown("## Draw, and have it followed")
        # The editor takes the full width: beside other components it misplaces its canvas.
        editor = _add_editor(width, height)
        with gr.Row():
            with gr.Column():
                button, settings = _add_settings(config, titles, bool(service.redrawings))
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
            _DrawAction(service).on_click,
            [editor, *settings, gallery],
            gallery,
            concurrency_limit=1,
            api_name="draw",
        )
    return page


def canvas_size(convention: Convention) -> tuple[int, int]:
    """Return width and height of the canvas: a multiple of the picture's that is large enough."""
    width, height = min(convention.sizes, key=lambda size: max(size) / min(size))
    factor = -(-SMALLEST_CANVAS_PX // max(width, height))
    return width * factor, height * factor


def _add_editor(width: int, height: int) -> gr.ImageEditor:
    # Light lines on black, like outlines, Canny edges and HED.
    black = Image.new("RGB", (width, height))
    canvas = {"background": black, "layers": [], "composite": black}
    editor = gr.ImageEditor(
        value=canvas,
        type="pil",
        image_mode="RGBA",  # what is transparent in an uploaded picture stays so
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
    # Cleared, it would be white, and what the brush draws would not show.
    editor.clear(lambda: canvas, None, editor, api_visibility="private")
    return editor


def _add_settings(
    config: ServeConfig, titles: list[str], draws_controls: bool
) -> tuple[gr.Button, list[Any]]:
    """Return the button, and the fields in the order of `_DrawAction.on_click`'s parameters."""
    from_photo = gr.Checkbox(
        label="It is a photograph: draw the conditioning image from it",
        visible=draws_controls,
        elem_id="from-photo",
    )
    prompt = gr.Textbox(label="Prompt", elem_id="prompt")
    button = gr.Button("Draw", variant="primary", elem_id="draw")
    title = gr.Dropdown(titles, value=titles[0], label="ControlNet")
    scale = gr.Slider(
        0,
        max(MOST_STRENGTH, *config.controlnet_conditioning_scale),
        config.controlnet_conditioning_scale[0],
        step=0.05,
        label="Strength",
    )
    negative_prompt = gr.Textbox(label="Negative prompt", value=config.negative_prompt)
    guidance = gr.Slider(
        min(1.0, config.guidance_scale),
        max(MOST_GUIDANCE, config.guidance_scale),
        config.guidance_scale,
        step=0.5,
        label="Guidance",
    )
    steps = gr.Slider(1, config.most_steps, config.num_inference_steps, step=1, label="Steps")
    seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
    return button, [prompt, negative_prompt, title, seed, steps, guidance, scale, from_photo]


class _DrawAction:
    """What the button does; the parameters of `on_click` are the page's interface for programs."""

    def __init__(self, service: DrawService) -> None:
        self.service = service

    def on_click(
        self,
        editor: dict[str, Any] | None,
        prompt: str,
        negative_prompt: str,
        title: str,
        seed: float | None,
        steps: float,
        guidance: float,
        scale: float,
        from_photo: bool,
        shown: list[tuple[str, str]] | None,
    ) -> list[tuple[Any, str]]:
        """Draw a picture; return it with its caption, before those that are shown already.

        After a picture from a photograph comes the conditioning image that was drawn.

        Raises:
            gr.Error: a value is out of bounds, or the picture cannot be drawn or written.
        """
        try:
            path, control = self.service.draw(
                flatten(editor, self._background(title)),
                prompt,
                negative_prompt,
                title,
                seed=int(seed or 0),
                num_inference_steps=int(steps),
                guidance_scale=float(guidance),
                controlnet_conditioning_scale=float(scale),
                from_photo=bool(from_photo),
            )
        except (ConfigError, RunError, ShardError) as error:
            raise gr.Error(str(error)) from error
        except OSError as error:
            raise gr.Error(f"The picture cannot be kept: {error.strerror or error}.") from error
        caption = (
            f"{prompt}. {title}, seed {int(seed or 0)}, {int(steps)} steps, "
            f"guidance {guidance:g}, strength {scale:g}"
        )
        new: list[tuple[Any, str]] = [(_pixels(path), caption)]
        if from_photo:
            new.append((_pixels(control), f"drawn from the photograph, for {title}"))
        return [*new, *(shown or [])]

    def _background(self, title: str) -> str:
        controlnet = self.service.controlnets.get(title)
        return controlnet.convention.background if controlnet else BACKGROUND


def _pixels(path: Path) -> Image.Image:
    """Return a file's pixels alone: its settings hold paths of this machine."""
    with Image.open(path) as picture:
        return Image.fromarray(np.asarray(picture))


def flatten(editor: dict[str, Any] | None, background: str = BACKGROUND) -> Image.Image:
    """Return the image in the editor, RGB, transparent parts in the colour of a background.

    Raises:
        ConfigError: the editor is empty.
    """
    image = (editor or {}).get("composite")
    if image is None:
        raise ConfigError("Draw or upload a conditioning image.")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
