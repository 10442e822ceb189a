"""The stock diffusers pipeline with ControlNets: finding and checking its models, full memory."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from common.device import pick_device
from common.errors import ConfigError, RunError
from common.memory.exhausted import first_line, is_out_of_memory
from infer.config import PipelineConfig
from infer.memory.estimate import remedies
from sd3.base.find import find_base
from sd3.base.without_t5 import T5_COMPONENTS, uses_t5
from sd3.inpainting import is_inpainting
from sd3.pretrained import (
    controlnet_mismatches,
    find_controlnet,
    read_config,
)

COMPONENTS = (
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)
TEXT_COMPONENTS = COMPONENTS[3:]
Config = TypeVar("Config", bound=PipelineConfig)


def with_dtype(config: Config) -> Config:
    """Return settings with the number format that `--dtype auto` is on their device."""
    if config.dtype != "auto":
        return config
    on_gpu = pick_device(config.device).type == "cuda"
    return replace(config, dtype="bfloat16" if on_gpu else "float32")


def find_models(
    config: PipelineConfig, controlnets: Sequence[str], components: Sequence[str] = COMPONENTS
) -> tuple[Path, list[Path]]:
    """Return the folders of the base model and of ControlNets that fit it; nothing is loaded.

    Args:
        config: settings of the run.
        controlnets: folders or hub ids.
        components: parts of the base model that must exist.

    Raises:
        ConfigError: a model cannot be found, a ControlNet's widths differ from the base's, or it
            takes more than a conditioning image and a mask.
    """
    if not uses_t5(config.pretrained_model_name_or_path, wanted=config.t5):
        components = [name for name in components if name not in T5_COMPONENTS]
    base = find_base(
        config.pretrained_model_name_or_path,
        components,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        single_file_config=config.single_file_config,
        transformer=config.transformer,
    )
    transformer = read_config(base, "transformer")
    folders = []
    for name in controlnets:
        folder = find_controlnet(name, "--controlnet", cache_dir=config.cache_dir)
        saved = read_config(folder, "")
        extra = saved.get("extra_conditioning_channels") or 0
        if extra and not is_inpainting(saved):
            channels = saved.get("in_channels", 16)
            raise ConfigError(
                f"--controlnet {name} takes {channels + extra} channels; a conditioning image has "
                f"{channels}, and with the mask of inpainting {channels + 1}."
            )
        if wrong := controlnet_mismatches(saved, transformer):
            listing = "\n".join(wrong)
            raise ConfigError(
                f"--controlnet {name} was not trained for "
                f"{config.pretrained_model_name_or_path}:\n{listing}"
            )
        folders.append(folder)
    return base, folders


def short_titles(names: Sequence[str]) -> list[str]:
    """Return a short, unique title for each ControlNet: the last parts of its path or hub id.

    The folder `controlnet` in a checkpoint is left out: `out/checkpoint-500/controlnet` becomes
    `checkpoint-500`.
    """
    paths = [[part for part in name.replace("\\", "/").split("/") if part] for name in names]
    paths = [path[:-1] if path[-1:] == ["controlnet"] and path[:-1] else path for path in paths]
    for count in range(1, max(map(len, paths)) + 1):
        titles = ["-".join(path[-count:]) for path in paths]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{number}-{'-'.join(path[-1:])}" for number, path in enumerate(paths)]


@contextlib.contextmanager
def full_memory_explained(config: PipelineConfig) -> Iterator[None]:
    """Turn an error about full memory into one that names the options that would save some.

    Args:
        config: settings of the run, with a number format.

    Raises:
        RunError: memory is full.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, config) from error


def out_of_memory(error: RuntimeError, config: PipelineConfig) -> RunError:
    """Return an error that names the options that would save memory, the best first.

    Args:
        error: torch's.
        config: settings of the run, with a number format.
    """
    helpful = [flags for flags, _ in remedies(config)]
    helpful.append("a smaller --resolution, or --height and --width")
    return RunError(
        f"out of memory: {first_line(error)} Finished pictures are kept. What helps, the most "
        f"first: {'; '.join(helpful)}."
    )
