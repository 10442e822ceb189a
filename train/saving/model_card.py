"""The model card of a trained ControlNet."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from PIL import Image
from safetensors import SafetensorError, safe_open

from common.atomic_files import write_text
from common.options import as_dict
from common.provenance import commit, versions
from sd3.controlnet.block_counts import describe_count
from sd3.controlnet.kinds import kind_of
from sd3.controlnet.pooled_projection import pooled_projection_of
from sd3.inpainting import is_inpainting
from sd3.pixels import SCALES
from sd3.pretrained import DATA_KEY, is_hub_id
from shards.format.specs import describe_annotator
from train.assembly import Run
from train.config import TrainConfig
from train.saving.controlnet import EMA_FOLDER
from train.validation.pictures import PROMPT_KEY

CARD = "README.md"
TAGS = ("controlnet", "diffusers-training", "sd3", "sd3-diffusers", "text-to-image")
# Paths of this machine do not go into the card.
PRIVATE = ("output_dir", "cache", "local_cache_dir", "cache_dir", "logging_dir")
# What the ControlNet is given, by its convention.
DRIVEN = {
    "prompt": "diffusers gives it what it was trained with: the prompt's pooled embedding, and the "
    "control's latents shifted as the VAE says. ComfyUI gives it neither, and its pictures are off "
    "there.",
    "zeros": "diffusers and ComfyUI give it what it was trained with: zeros for the pooled "
    "embedding, and the control's latents without the VAE's shift.",
}


def write_card(run: Run, repository: str | None) -> None:
    """Write the model card beside the ControlNet.

    Args:
        run: the run that has ended.
        repository: where it is uploaded to, e.g. `owner/name`; None if it is not.
    """
    write_text(run.config.output_dir / CARD, model_card(run, repository))


def model_card(run: Run, repository: str | None) -> str:
    """Return the card as Markdown: what the ControlNet is, how to load it, how it was made."""
    config, network = run.config, run.accelerator.unwrap_model(run.controlnet)
    data: dict[str, Any] = network.config[DATA_KEY]
    base = hub_name(config.pretrained_model_name_or_path)
    folder = Path(config.pretrained_model_name_or_path).name
    name = repository or config.hub_model_id or config.output_dir.resolve().name
    num_layers, num_images = network.config.num_layers, run.inputs.order.num_records
    return f"""---
{_metadata(base)}
---

# {name}

A ControlNet of {num_layers} blocks for {base or f"the base model {folder!r}"},
trained on {num_images} images at {data["width"]} x {data["height"]} pixels
with the control "{config.conditioning_name}".

## How to use it

{_example(name, base or f"path/to/{folder}", data, inpainting=is_inpainting(network.config))}

{_inputs_note(network.config, run.transformer.config.num_layers)}{_ema_note(run)}
## Pictures

{_gallery(config) or "None were drawn while it was trained."}

## How it was made

{_origin(run, data)}

The licence of the base model applies to what is derived from it.
"""


def hub_name(name_or_path: str) -> str | None:
    """Return a base model's name on the hub, e.g. `owner/name`; None if its folder tells none."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return name_or_path
    if name := _name_in(str(folder.resolve())):
        return name
    # diffusers notes there what a model was loaded from.
    for path in (folder / "model_index.json", folder / "transformer" / "config.json"):
        try:
            loaded_from = str(json.loads(path.read_text(encoding="utf-8")).get("_name_or_path"))
        except (OSError, ValueError, AttributeError):
            continue
        if is_hub_id(loaded_from) and not Path(loaded_from).exists():
            return loaded_from
        if name := _name_in(loaded_from):
            return name
    return None


def _name_in(path: str) -> str | None:
    """Return the name in the path of a copy that huggingface_hub keeps of a repository."""
    found = re.search(r"\bmodels--([^/\\]+?)--([^/\\]+)", path)
    return f"{found[1]}/{found[2]}" if found else None


def _metadata(base: str | None) -> str:
    """Return the YAML that the hub reads."""
    metadata: str = ModelCardData(
        base_model=base,
        library_name="diffusers",
        tags=list(TAGS),
        inference=True,
    ).to_yaml()
    return metadata


def _example(name: str, base: str, data: dict[str, Any], *, inpainting: bool) -> str:
    """Return Python that loads the ControlNet and draws what `python -m infer generate` draws."""
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
    return f"""```python
{numpy}import torch
from diffusers import SD3ControlNetModel, {pipeline}
from diffusers.utils import load_image
from PIL import Image

controlnet = SD3ControlNetModel.from_pretrained("{name}", dtype=torch.float16)
pipeline = {pipeline}.from_pretrained(
    "{base}", controlnet=controlnet, dtype=torch.float16
)
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


def _inputs_note(controlnet: Mapping[str, Any], num_base_blocks: int) -> str:
    """Return what programs give the ControlNet, and what ComfyUI makes of its number of blocks."""
    if kind_of(controlnet) == "stability":
        return (
            "It is of Stability's kind: blocks of the picture alone. diffusers gives it what it was"
            " trained with.\n"
        )
    if is_inpainting(controlnet):
        return "It is for inpainting, and diffusers gives it what it was trained with.\n"
    driven, num_layers = DRIVEN[pooled_projection_of(controlnet)], controlnet["num_layers"]
    of_base = f"The base's {num_base_blocks} blocks are a multiple of its {num_layers}"
    fits = f"{of_base}, as ComfyUI needs it"
    return f"{driven}\n{describe_count(num_layers, num_base_blocks) or fits}.\n"


def _ema_note(run: Run) -> str:
    """Return where the averaged weights are, or nothing if there are none."""
    if run.ema is None:
        return ""
    return (
        f"\nA moving average of the weights (decay {run.config.ema_decay}) is in `{EMA_FOLDER}/`: "
        f'pass `subfolder="{EMA_FOLDER}"`.\n'
    )


def _gallery(config: TrainConfig) -> str:
    """Return the last validation's pictures, each under the prompt that it was drawn from."""
    entries, steps = [], 0
    for path in pictures(config):
        prompt = _prompt_of(path)
        if prompt is None:
            continue
        steps = int(path.parent.name.removeprefix("step-"))
        weights = ", averaged weights" if path.stem.endswith("-ema") else ""
        address = path.relative_to(config.output_dir).as_posix()
        entries.append(f"{prompt}{weights}\n\n![{path.stem}]({address})")
    if not entries:
        return ""
    legend = "From left to right: the conditioning image, and what came of it"
    return "\n\n".join([*entries, f"{legend} after {steps} steps."])


def _prompt_of(picture: Path) -> str | None:
    """Return the prompt in a picture's file, or in the latents it was decoded from.

    None if neither tells it: the cache's pairs may be others than those that were drawn.
    """
    try:
        with Image.open(picture) as image:
            prompt = image.info.get(PROMPT_KEY)
        if prompt is None:
            with safe_open(picture.with_suffix(".safetensors"), framework="pt") as latents:
                prompt = (latents.metadata() or {}).get(PROMPT_KEY)
    except (OSError, SyntaxError, ValueError, SafetensorError):
        return None
    return None if prompt is None else str(prompt)


def _origin(run: Run, data: dict[str, Any]) -> str:
    """Return the versions, data and settings that the ControlNet was made with."""
    made_with = ", ".join(f"{library} {version}" for library, version in versions().items())
    base = hub_name(run.config.pretrained_model_name_or_path)
    settings = "\n".join(
        f"    {key} = {value}"
        for key, value in (as_dict(run.config) | {"pretrained_model_name_or_path": base}).items()
        if key not in PRIVATE and value is not None and not _is_path(value)
    )
    return f"""{run.num_steps} steps; made with {made_with}; \
commit {commit() or "unknown"} of the training code.

- latents: `{data["latents_fingerprint"]}`
- prompts: `{data["text_fingerprint"]}`
- conditioning images: scale {data["conditioning_scale"]}, transparent ones over \
{tuple(data["background"])}
{_annotator_line(data)}
{settings}"""


def _annotator_line(data: dict[str, Any]) -> str:
    annotator = data.get("annotator")
    if not annotator:
        return ""
    return (
        f"- controls drawn by: `{describe_annotator(annotator['name'], annotator['arguments'])}`\n"
    )


def pictures(config: TrainConfig) -> list[Path]:
    """Return the last validation's pictures."""
    steps = sorted((config.output_dir / "validation").glob("step-*[0-9]"))
    return sorted(steps[-1].glob("*.png")) if steps else []


def _is_path(value: object) -> bool:
    """Tell whether a setting is a path of this machine."""
    return isinstance(value, str) and "/" in value and Path(value).exists()
