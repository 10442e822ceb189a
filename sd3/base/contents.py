"""What a one-file checkpoint of SD3 or SD3.5 holds, from the names and shapes of its tensors.

Its names are those that Stability AI published the models with: `joint_blocks.0.x_block...`, with
or without `model.diffusion_model.` before them, for the transformer; `first_stage_model...` for the
VAE; `text_encoders.clip_l...`, `clip_g` and `t5xxl` for the text encoders. The configurations and
tokenizers are not in it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import ConfigError

# Of each component a part of names that no other has.
MARKS = {
    "transformer": "joint_blocks.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.clip_g.",
    "text_encoder_3": "text_encoders.t5xxl.",
}
DIFFUSERS_MARK = "transformer_blocks."
LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.")
SCALES = ("scaled_fp8", ".scale_weight", ".weight_scale")
# Where the configurations and tokenizers of each published model are.
MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"
MEDIUM_35 = "stabilityai/stable-diffusion-3.5-medium"
LARGE_35 = "stabilityai/stable-diffusion-3.5-large"
BLOCKS_OF_LARGE = 38
# Of safetensors' number formats. Every number of 8 bit is one in bfloat16 too.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F8_E4M3": "bfloat16"}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        components: names of a diffusers folder's components, as `transformer`.
        dtypes: of each component, the number format to store it in: that of most of its numbers,
            and bfloat16 for 8 bit.
        published: hub id of the published model whose configurations fit.
    """

    components: tuple[str, ...]
    dtypes: Mapping[str, str]
    published: str


def read_contents(path: Path, flag: str) -> Contents:
    """Return what a checkpoint holds; only its header is read.

    Args:
        path: a safetensors file.
        flag: the option that gave it, for the error message.

    Raises:
        ConfigError: it cannot be read, is no SD3 checkpoint, or its numbers need scales that
            diffusers does not apply.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{flag} {path}: cannot be read as safetensors ({error}).") from error
    if reason := _unfit(tensors):
        raise ConfigError(f"{flag} {path}: {reason}")
    numbers: dict[str, Counter[str]] = {}
    for name, (dtype, shape) in tensors.items():
        if component := component_of(name):
            size = 1
            for side in shape:
                size *= side
            numbers.setdefault(component, Counter())[dtype] += size
    return Contents(
        tuple(name for name in MARKS if name in numbers),
        {name: _stored_dtype(counts, path, flag) for name, counts in numbers.items()},
        _published(tensors),
    )


def component_of(name: str) -> str | None:
    """Return the component that a tensor of a checkpoint belongs to."""
    for component, mark in MARKS.items():
        if mark in name:
            return component
    return "transformer" if name.startswith(DIFFUSERS_MARK) else None


def _unfit(tensors: Mapping[str, object]) -> str | None:
    """Return why a file is no SD3 checkpoint that can be read, and what to do; None if it is."""
    if any(mark in name for name in tensors for mark in LORA_MARKS):
        return "a LoRA, not a model. Give it to --lora, beside its base model."
    if any("controlnet" in name for name in tensors):
        return "a ControlNet, not a base model."
    if not any(component_of(name) == "transformer" for name in tensors):
        first = min(tensors, default="none")
        return (
            "no transformer of SD3 in it: none of its names has joint_blocks, as SD3's and SD3.5's "
            f"have; {len(tensors)} tensors, {first} first. Other models cannot be used."
        )
    if any(mark in name for name in tensors for mark in SCALES):
        return (
            "its 8 bit weights need scales that only ComfyUI applies. Give the same model in 16 "
            "bit; --quantize-base fp8 stores it in 8 bit here."
        )
    return None


def _stored_dtype(counts: Counter[str], path: Path, flag: str) -> str:
    ((most, _),) = counts.most_common(1)
    if most not in DTYPES:
        raise ConfigError(
            f"{flag} {path}: its numbers are {most}; expected {', '.join(DTYPES)}. Give the model "
            "in 16 bit."
        )
    return DTYPES[most]


def _published(tensors: Mapping[str, object]) -> str:
    blocks = {_block(name) for name in tensors} - {None}
    if len(blocks) == BLOCKS_OF_LARGE:
        return LARGE_35
    return MEDIUM_35 if any(".attn2." in name for name in tensors) else MEDIUM


def _block(name: str) -> str | None:
    for mark in (MARKS["transformer"], DIFFUSERS_MARK):
        if mark in name:
            return name.partition(mark)[2].partition(".")[0]
    return None
