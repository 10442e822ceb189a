"""The model card of a trained ControlNet."""

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
from sd3.pretrained import DATA_KEY
from shards.format.specs import describe_annotator
from train.assembly import Run
from train.config import TrainConfig
from train.saving.best import BEST_FOLDER, read_best
from train.saving.card_base import card_base
from train.saving.card_example import example
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
    base = card_base(config)
    name = repository or config.hub_model_id or config.output_dir.resolve().name
    num_layers, num_samples = network.config.num_layers, run.inputs.order.num_records
    return f"""---
{_metadata(base.hub_id)}
---

# {name}

A ControlNet of {num_layers} blocks for {base.in_words},
trained on {num_samples} pairs of an image and its control, at {_sizes(data)} pixels,
with {_controls(run)}.

## How to use it

{example(name, base, data, inpainting=is_inpainting(network.config))}

{_inputs_note(network.config, run.transformer.config.num_layers)}{_ema_note(run)}{_best_note(run)}
## Pictures

{_gallery(config) or "None were drawn while it was trained."}

## How it was made

{_origin(run, data)}

The licence of the base model applies to what is derived from it.
"""


def _sizes(data: Mapping[str, Any]) -> str:
    """Return the size of the pictures in words; of several that nearest to a square."""
    others = len(data.get("buckets", [])) - 1
    shown = f"{data['width']} x {data['height']}"
    return f"{shown} and {others} other sizes of" if others > 0 else shown


def _controls(run: Run) -> str:
    """Return the control in words, or all that were mixed."""
    names = dict.fromkeys(one.cache.conditioning_name for one in run.inputs.sets)
    quoted = [f'"{name}"' for name in names]
    if len(quoted) == 1:
        return f"the control {quoted[0]}"
    return f"the controls {', '.join(quoted[:-1])} and {quoted[-1]}, mixed"


def _metadata(base: str | None) -> str:
    """Return the YAML that the hub reads."""
    metadata: str = ModelCardData(
        base_model=base,
        library_name="diffusers",
        tags=list(TAGS),
        inference=True,
    ).to_yaml()
    return metadata


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


def _best_note(run: Run) -> str:
    """Return where the weights of the lowest held-out loss are, or nothing if none are kept."""
    best = read_best(run.config.output_dir) if run.config.keep_best else None
    if best is None:
        return ""
    what = "the moving average" if best.averaged else "the weights"
    return (
        f"\nThe held-out loss was lowest at step {best.step}, {best.held_out_loss:.4f}; {what} of "
        f'that step are in `{BEST_FOLDER}/`: pass `subfolder="{BEST_FOLDER}"`.\n'
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
    base = card_base(run.config)
    settings = "\n".join(
        f"    {key} = {value}"
        for key, value in (as_dict(run.config) | base.settings).items()
        if key not in PRIVATE and value is not None and not _is_path(value)
    )
    return f"""{run.num_steps} steps; made with {made_with}; \
commit {commit() or "unknown"} of the training code.

- latents: `{data["latents_fingerprint"]}`
- prompts: `{data["text_fingerprint"]}`
- conditioning images: scale {data["conditioning_scale"]}, transparent ones over \
{tuple(data["background"])}
{_annotator_line(data)}{_range_line(data)}{_mixed_lines(data)}
{settings}"""


def _range_line(data: dict[str, Any]) -> str:
    return f"- samples{_span(data)}\n" if "records" in data else ""


def _mixed_lines(data: dict[str, Any]) -> str:
    """Return a line for each of several sets of samples."""
    return "".join(
        f"- set {one['name']}: {one['num_records']} samples{_span(one)}, control "
        f'"{one["control"]}", '
        f"{one['share']:.1%} of the samples, latents `{one['latents_fingerprint']}`"
        f"{_drawn_by(one)}\n"
        for one in data.get("mixed", [])
    )


def _span(entry: Mapping[str, Any]) -> str:
    if "records" not in entry:
        return ""
    first, behind = entry["records"]
    return f" ({first} to {behind - 1} of its cache)"


def _drawn_by(entry: Mapping[str, Any]) -> str:
    annotator = entry.get("annotator")
    if not annotator:
        return ""
    return f", drawn by `{describe_annotator(annotator['name'], annotator['arguments'])}`"


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
