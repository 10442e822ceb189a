"""The lines of Python in a model card."""

from typing import Any

from sd3.pixels import SCALES
from train.saving.card_base import CardBase


def example(name: str, base: CardBase, data: dict[str, Any], *, inpainting: bool) -> str:
    """Return Python that loads the ControlNet and draws what `python -m infer generate` draws.

    Args:
        name: of the ControlNet, as `from_pretrained` takes it.
        base: its base model.
        data: what it says of its data.
        inpainting: whether it is for inpainting.
    """
    pipeline = "StableDiffusion3ControlNetPipeline"
    names, arguments = ["conditioning"], "control_image=conditioning,"
    if inpainting:
        pipeline = "StableDiffusion3ControlNetInpaintingPipeline"
        names = ["picture", "mask"]
        arguments = "control_image=picture,\n    control_mask=mask,  # white: drawn anew"
    bilinear = "Image.Resampling.BILINEAR"
    loading = "\n".join(
        f'{each} = load_image("{each}.png").resize(size, {bilinear})' for each in names
    )
    numpy = ""
    factor, offset = SCALES[data.get("conditioning_range", "-1_1")]
    if (factor, offset) != SCALES["-1_1"]:
        numpy = "import numpy as np\n"
        scaled = "" if (factor, offset) == (1, 0) else f" * {factor:g} + {offset:g}"
        loading += (
            "\n# In the range of training, which is not the pipeline's own.\n"
            "pixels = torch.from_numpy(np.array(conditioning)).permute(2, 0, 1)[None] / 255\n"
            f"conditioning = pixels{scaled}"
        )
    base_name = base.hub_id or f"path/to/{base.name}"
    classes, transformer, given = f"SD3ControlNetModel, {pipeline}", "", ""
    if base.transformer:
        classes = f"SD3ControlNetModel, SD3Transformer2DModel, {pipeline}"
        transformer = f"""
transformer = SD3Transformer2DModel.from_single_file(
    "path/to/{base.transformer}",
    config="{base_name}",
    subfolder="transformer",
    torch_dtype=torch.float16,
)"""
        given = "transformer=transformer, "
    if not data.get("t5", True):
        given += "text_encoder_3=None, tokenizer_3=None, "
    return f"""```python
{numpy}import torch
from diffusers import {classes}
from diffusers.utils import load_image
from PIL import Image

controlnet = SD3ControlNetModel.from_pretrained("{name}", dtype=torch.float16){transformer}
pipeline = {pipeline}.from_pretrained(
    "{base_name}", controlnet=controlnet, {given}dtype=torch.float16
){_merging(base)}
size = ({data["width"]}, {data["height"]})  # as in training; give images of this shape
{loading}
image = pipeline(
    "a prompt",
    {arguments}
    width=size[0],
    height=size[1],
    max_sequence_length={data["max_sequence_length"]},  # as in training; the pipeline's own is 256
    generator=torch.manual_seed(0),
).images[0]
```"""


def _merging(base: CardBase) -> str:
    """Return the lines that merge the LoRAs, one after the other."""
    lines = []
    for name, scale, is_read in base.loras:
        path = name if "/" in name else f"path/to/{name}"
        if is_read:
            lines += [
                f'pipeline.load_lora_weights("{path}")',
                f"pipeline.fuse_lora(lora_scale={scale:g})",
                "pipeline.unload_lora_weights()",
            ]
        else:
            lines.append(
                f"# Without {name} at {scale:g}: diffusers does not read its names for SD3, and "
                "python -m infer generate --lora does."
            )
    return "".join(f"\n{line}" for line in lines)
