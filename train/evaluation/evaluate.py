"""`--evaluate`: held-out losses and pictures of one ControlNet, as a validation makes them.

evaluation/NAME/                in the output folder, NAME as the ControlNet is called
    evaluation.json             held-out losses, whole and by noise level
    0.png, 0-ema.png            pictures of the cache's pairs, as in `validation/`
"""

import contextlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.atomic_files import write_text
from common.errors import ConfigError
from sd3.pretrained import find_controlnet
from train import assembly
from train.assembly import Run
from train.config import TrainConfig
from train.optim.ema import Ema
from train.processes.agreement import local_main_first, main_decides
from train.saving import checkpoints
from train.saving.controlnet import CONTROLNET_FOLDER, EMA_FOLDER
from train.saving.resuming import find_damage
from train.validation import pictures
from train.validation.held_out import held_out_records
from train.watch.curves import AVERAGED_HELD_OUT, BASE_HELD_OUT, HELD_OUT, NUM_LEVELS, mean

FOLDER = "evaluation"
RESULT_FILE = "evaluation.json"
FLAG = "--evaluate"
WHAT = {
    HELD_OUT: "the ControlNet",
    AVERAGED_HELD_OUT: "its weights' average",
    BASE_HELD_OUT: "without, the base alone",
}


def evaluate(config: TrainConfig) -> None:
    """Measure the ControlNet of `config.evaluate`, draw its pictures and say what was found.

    The weights' average is measured too where it lies beside the weights. The run's own files are
    left alone.

    Raises:
        ConfigError: there is no such ControlNet, it does not go with the cache, or the cache has no
            held-out rows.
        ShardError: the cache is incomplete or damaged.
        OSError: the output cannot be written.
    """
    name = str(config.evaluate)
    folder = local_main_first(lambda: _find(name, config))
    with contextlib.closing(assembly.assemble(_settings(config, folder))) as run:
        if not run.inputs.measures_held_out:
            raise ConfigError(
                f"{FLAG}: {', '.join(config.cache)}: no held-out rows to measure on. Hold "
                "some out of training: precompute --validation-rows 128."
            )
        final = run.config.output_dir / _title(name, folder)
        with pictures.written_whole(run, final) as unfinished:
            averages = [_average(run, path)] if (path := _average_of(folder)) else []
            losses = pictures.measure(run, unfinished, averages)
            losses |= _of_base_alone(run)
            main_decides(lambda: _write(unfinished / RESULT_FILE, name, run, losses))
        if run.accelerator.is_main_process:
            click.echo(_table(name, run, losses))
            click.echo(f"{final}: {RESULT_FILE} and {len(run.inputs.pairs)} pairs' pictures")


def _find(name: str, config: TrainConfig) -> Path:
    """Return the folder of a ControlNet; a checkpoint may be named as it is in the output folder.

    Raises:
        ConfigError: there is none, or the checkpoint is damaged.
    """
    path = Path(name)
    if not path.is_dir() and (config.output_dir / name).is_dir():
        path = config.output_dir / name
    if not path.is_dir() and path.name.startswith(checkpoints.PREFIX):
        there = [each.name for each in checkpoints.find(config.output_dir)]
        raise ConfigError(
            f"{FLAG} {name}: no such checkpoint; {config.output_dir} holds "
            f"{', '.join(there) or 'none'}."
        )
    if (path / checkpoints.STATE_FILE).is_file() and (damage := find_damage(path)):
        raise ConfigError(f"{FLAG} {name}: the checkpoint is damaged ({damage}); take another.")
    return find_controlnet(str(path) if path.is_dir() else name, FLAG, cache_dir=config.cache_dir)


def _settings(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the settings of a run that begins with the ControlNet and writes beside the run's."""
    return replace(
        config,
        output_dir=config.output_dir / FOLDER,
        controlnet_model_name_or_path=str(folder),
        num_controlnet_layers=None,
        controlnet_kind=None,
        resume_from_checkpoint=None,
        validation_steps=max(1, config.validation_steps),
        ema_decay=None,
        keep_best=False,
        push_to_hub=False,
        report_to="none",
        dashboard=False,
    )


def _title(name: str, folder: Path) -> str:
    """Return the name of the figures' folder: the checkpoint's, folder's or repository's."""
    if not Path(name).is_dir() and "/" in name:
        return name.replace("/", "--")
    return (folder.parent if folder.name == CONTROLNET_FOLDER else folder).resolve().name


def _average_of(folder: Path) -> Path | None:
    """Return where the average of a ControlNet's weights lies: beside it, or in a run's folder."""
    parent = folder.parent if folder.name == CONTROLNET_FOLDER else folder
    average = parent / EMA_FOLDER
    return average if (average / "config.json").is_file() else None


def _average(run: Run, folder: Path) -> Ema:
    """Return averaged weights as a run holds them, read from their folder."""
    saved = assembly.load_controlnet(run.config, replace(run.inputs, controlnet=folder))
    average = Ema(run.accelerator.unwrap_model(run.controlnet), decay=0.5)  # never updated
    average.restore(saved.state_dict(), 1)
    return average


def _of_base_alone(run: Run) -> dict[str, list[float]]:
    """Return the held-out loss by level without the ControlNet: as a new one has it at step 0."""
    network = run.accelerator.unwrap_model(run.controlnet)
    without = partial(network, conditioning_scale=0.0)
    return pictures.held_out_losses(run, without, BASE_HELD_OUT)


def _write(path: Path, name: str, run: Run, losses: dict[str, list[float]]) -> None:
    found: dict[str, Any] = {
        "controlnet": name,
        "cache": list(run.config.cache),
        "num_rows": _num_rows(run),
        "means": {each: mean(levels) for each, levels in losses.items()},
        "levels": losses,
    }
    write_text(path, json.dumps(found, indent=1) + "\n")


def _num_rows(run: Run) -> int:
    return sum(len(held_out_records(one.cache)) for one in run.inputs.sets)


def _in_words(curve: str) -> str:
    """Return what a loss is of; in a mix of sets each set has its own."""
    name, _, of_set = curve.partition("/")
    return f"{WHAT[name]}, {of_set}" if of_set else WHAT[name]


def _table(name: str, run: Run, losses: dict[str, list[float]]) -> str:
    """Return the losses as lines, a column a noise level."""
    titles = {each: _in_words(each) for each in losses}
    width = max(map(len, titles.values()))
    levels = "".join(f"{f'{level}/{NUM_LEVELS}':>8}" for level in range(NUM_LEVELS))
    lines = [
        f"{name}: held-out loss of {_num_rows(run)} rows, whole and by noise level",
        f"{'':{width}}{'mean':>8}{levels}",
    ]
    for each, values in losses.items():
        figures = "".join(f"{value:8.4f}" for value in [mean(values), *values])
        lines.append(f"{titles[each]:{width}}{figures}")
    return "\n".join(lines)
