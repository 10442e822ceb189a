"""What drawing takes, from configurations alone; `--offload auto`; what would make it less."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import click

from common.device import free_gpu_bytes
from common.errors import ConfigError
from common.memory.need import GB, GIB, Need
from common.memory.processes import map_in_processes
from common.options import as_arguments
from infer.config import GenerateConfig, Offload, PipelineConfig
from infer.convention import check_positions, given_sizes, native_sizes, read_convention
from infer.memory.simulation import Drawing, Sizes, simulate
from precompute.config import PrecomputeConfig
from precompute.memory.simulation import read_sizes
from sd3.base.find import find_base
from sd3.base.without_t5 import uses_t5
from sd3.pretrained import controlnet_mismatches, find_controlnet, read_config
from sd3.prompt_embeds import CLIP_TOKENS
from train.models import controlnet_config

Config = TypeVar("Config", bound=PipelineConfig)
# From the fastest to the leanest.
OFFLOADS: tuple[Offload, ...] = ("none", "model", "groups")
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
# Changes that may help, each with the settings that it requires.
REMEDIES: tuple[dict[str, Any], ...] = (
    {"batch_size": 1},
    {"dtype": "bfloat16"},
    {"offload": "model"},
    {"offload": "groups"},
    {"quantize_base": "int8"},
    {"quantize_base": "nf4"},
    {"vae_tiling": True},
)


def need(config: PipelineConfig, free: int | None) -> Need:
    """Return what drawing takes.

    Args:
        config: settings of `generate`, `score` or `serve`.
        free: bytes of free device memory, by which `--offload auto` chooses; None for as many as
            it takes.

    Raises:
        ConfigError: a model is missing, or base and ControlNet do not go together.
    """
    config = assume_gpu(config)
    drawings = find_drawings(config)
    if config.offload != "auto":
        return need_with(drawings, config.offload)
    chosen = choose_offload(config, drawings, free)
    words = "" if chosen == "none" else f"--offload {chosen}"
    return replace(need_with(drawings, chosen), chosen=words)


def assume_gpu(config: Config) -> Config:
    """Return settings with the number format that a GPU has by default, unless on a CPU."""
    if config.dtype != "auto":
        return config
    return replace(config, dtype="float32" if config.device == "cpu" else "bfloat16")


def find_drawings(config: PipelineConfig) -> list[Drawing]:
    """Return what drawing takes, for each set of ControlNets that draw together.

    Without any, for one as `train` would make it.

    Raises:
        ConfigError: a model is missing, or base and ControlNet do not go together.
    """
    components = COMPONENTS[: 2 if _is_cached(config) else None]
    if not uses_t5(config.pretrained_model_name_or_path, wanted=config.t5):
        components = tuple(name for name in components if name != "text_encoder_3")
    base = find_base(
        config.pretrained_model_name_or_path,
        components,
        revision=config.revision,
        cache_dir=config.cache_dir,
        weights=False,
        single_file_config=config.single_file_config,
        transformer=config.transformer,
    )
    folders = [
        find_controlnet(name, "--controlnet", cache_dir=config.cache_dir, weights=False)
        for name in config.controlnet
    ]
    together = isinstance(config, GenerateConfig) and config.combine
    sets = [folders] if together or not folders else [[folder] for folder in folders]
    text = not _is_cached(config)
    return simulate_sets(config, base, sets, with_text_encoders=text)


def simulate_sets(
    config: PipelineConfig,
    base: Path,
    sets: Sequence[Sequence[Path]],
    *,
    with_text_encoders: bool,
    batch_size: int | None = None,
) -> list[Drawing]:
    """Return what drawing takes, for sets of ControlNets.

    Args:
        config: settings of the run, with a number format.
        base: folder of the base model.
        sets: folders of ControlNets that draw together; an empty one stands for a new ControlNet.
        with_text_encoders: whether they are loaded.
        batch_size: pictures drawn at a time; by default that of the settings, or 1.

    Raises:
        ConfigError: base and ControlNet do not go together.
    """
    with_t5 = uses_t5(config.pretrained_model_name_or_path, wanted=config.t5)
    encoders = read_sizes(base, with_t5=with_t5) if with_text_encoders else None
    found: dict[str, Drawing] = {}
    for folders in sets:
        controlnets, pictures, tokens = _read_controlnets(config, base, folders)
        sizes = Sizes(
            transformer=read_config(base, "transformer"),
            controlnets=controlnets,
            vae=read_config(base, "vae"),
            encoders=encoders,
            picture=max(pictures, key=lambda size: size[0] * size[1]),
            # Where a cache has the prompts, the encoders' configurations are not read.
            clip_tokens=CLIP_TOKENS
            if encoders is None
            else int(encoders.clips[0]["max_position_embeddings"]),
            tokens=tokens,
            batch_size=batch_size or int(getattr(config, "batch_size", 1)),
        )
        if repr(sizes) not in found:  # checkpoints of one run are alike
            found[repr(sizes)] = simulate(config, sizes)
    return list(found.values())


def _read_controlnets(
    config: PipelineConfig, base: Path, folders: Sequence[Path]
) -> tuple[tuple[dict[str, Any], ...], Sequence[tuple[int, int]], int]:
    """Return configurations, picture sizes and T5 tokens of ControlNets that draw together."""
    if not folders:
        sizes = given_sizes(config) or native_sizes(base)
        saved = controlnet_config(base, None)
        check_positions(sizes, base, saved)
        tokens = config.max_sequence_length or _default(PrecomputeConfig, "max_sequence_length")
        return (saved,), sizes, tokens
    saved_ones = tuple(read_config(folder, "") for folder in folders)
    for folder, saved in zip(folders, saved_ones, strict=True):
        if wrong := controlnet_mismatches(saved, read_config(base, "transformer")):
            raise ConfigError("\n".join([f"--controlnet {folder} does not fit the base:", *wrong]))
    convention = read_convention(config, base, str(folders[0]), folders[0])
    return saved_ones, convention.sizes, convention.max_sequence_length


def _default(config_class: type[Any], name: str) -> Any:
    return next(field.default for field in fields(config_class) if field.name == name)


def _is_cached(config: PipelineConfig) -> bool:
    """Return whether prompts come from a cache, as far as the settings say."""
    return isinstance(config, GenerateConfig) and config.cache is not None


def need_with(drawings: Sequence[Drawing], offload: Offload) -> Need:
    """Return what drawing takes with an offload."""
    return Need(
        max(drawing.peak(offload) for drawing in drawings),
        max(drawing.host(offload) for drawing in drawings),
    )


def choose_offload(
    config: PipelineConfig, drawings: Sequence[Drawing], free: int | None
) -> Offload:
    """Return the fastest offload that fits; where none does, the leanest.

    Args:
        config: settings of the run.
        drawings: what it takes.
        free: bytes of free device memory; None for as many as it takes.
    """
    possible = [offload for offload in OFFLOADS if not (config.compile and offload == "groups")]
    for offload in possible:
        if free is None or need_with(drawings, offload).fits(free):
            return offload
    return min(possible, key=lambda offload: need_with(drawings, offload).device)


def remedies(config: PipelineConfig) -> list[tuple[str, int]]:
    """Return options that would make it less, with the bytes saved, the most first.

    Of `--offload auto`, the leanest is taken for what it is: nothing leaner is left to it.

    Args:
        config: settings of the run, with a number format.
    """
    if config.offload == "auto":
        config = replace(config, offload="model" if config.compile else "groups")
    now = need(config, None).device
    changes = []
    for change in _possible_changes(config):
        with contextlib.suppress(ConfigError):  # the two do not go together
            changes.append((change, replace(config, **change)))
    needs = map_in_processes(
        lambda changed: need(changed, None), [changed for _, changed in changes]
    )
    savings = [
        (as_arguments(change), now - less.device)
        for (change, _), less in zip(changes, needs, strict=True)
    ]
    worthwhile = [saving for saving in savings if saving[1] > now / 100]
    return sorted(worthwhile, key=lambda saving: -saving[1])


def _possible_changes(config: PipelineConfig) -> Iterator[dict[str, Any]]:
    """Yield changes to settings that are not made yet."""
    for change in REMEDIES:
        ((name, value),) = change.items()
        if name == "offload":
            if config.offload in OFFLOADS[: OFFLOADS.index(value)]:
                yield change
        elif name == "batch_size":
            if getattr(config, name, 1) > value:
                yield change
        elif name == "quantize_base":
            if config.quantize_base in (None, "int8", "fp8")[: 1 if value == "int8" else 3]:
                yield change
        elif name == "dtype":
            if config.dtype == "float32":
                yield change
        elif not getattr(config, name):
            yield change
    if isinstance(config, GenerateConfig) and config.cache is None:
        yield {"cache": "CACHE"}


def report(config: PipelineConfig, free: int | None) -> str:
    """Return what drawing takes, part by part, in lines.

    Args:
        config: settings of the run.
        free: bytes of free device memory; None where there is no GPU.
    """
    config = assume_gpu(config)
    drawings = find_drawings(config)
    chosen = config.offload
    if chosen == "auto":
        chosen = choose_offload(config, drawings, free)
    drawing = max(drawings, key=lambda one: one.peak(chosen))
    count, (width, height) = drawing.batch_size, drawing.picture
    lines = [
        f"memory of one device, {count} picture{'s' * (count > 1)} of {width} x {height} px at a "
        f"time, {config.dtype}, --offload {chosen}, in GB:"
    ]
    for moment, parts in drawing.moments(chosen).items():
        listed = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts.items())
        lines.append(f"{sum(parts.values()) / GB:8.2f}  {moment}: {listed}")
    found = need_with(drawings, chosen)
    lines.append(f"{found.device / GB:8.2f}  the most at a time")
    lines.append(
        f"{found.free / GB:8.2f}  must be free ({found.free / GIB:.2f} GiB), with what is lost "
        "between tensors and what CUDA takes"
    )
    if free is not None:
        fits = "fits" if found.fits(free) else "does not fit"
        lines.append(f"{free / GB:8.2f}  are free on this GPU ({free / GIB:.2f} GiB): {fits}")
    lines.append(f"{found.host / GB:8.2f}  of host memory, through which all weights are loaded")
    others = [f"{other} {need_with(drawings, other).free / GB:.2f}" for other in OFFLOADS]
    lines.append(f"must be free with --offload {', '.join(others)}")
    return "\n".join(lines)


def advice(config: PipelineConfig, free: int | None) -> str:
    """Return what would make it less, in lines; the arguments are those of `report`."""
    config = assume_gpu(config)
    if config.offload == "auto":
        config = replace(config, offload=choose_offload(config, find_drawings(config), free))
    savings = remedies(config)
    lines = [f"{-saved / GB:+8.2f}  {flags}" for flags, saved in savings]
    return "\n".join(["less, in GB, with", *lines]) if lines else "no option would make it less"


def print_report(config: PipelineConfig) -> None:
    """Print what drawing takes; `--offload auto` goes by the free memory of a GPU that is here."""
    free = free_gpu_bytes(config.device)
    click.echo(report(config, free))
    click.echo(advice(config, free))  # takes a while
