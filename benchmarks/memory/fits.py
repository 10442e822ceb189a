"""`python -m benchmarks.memory.fits`: what all stages need of a card, and whether it has it.

Counted from configurations alone: there need be no weights, no cache and no GPU. Of the three
published bases not even the configurations are downloaded. `--table` prints the table of
docs/training.md.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.bases import TRANSFORMERS, published
from benchmarks.random_weights import save_configurations
from common.cards import PROCESS_BYTES, card_names, gives_up, settings_with
from common.command import CONTEXT, Command, user_errors
from common.config_file import read_section
from common.errors import ConfigError
from common.memory.need import CUDA_BYTES, GB, GIB, LOST_SHARE, Need
from common.options import RequiredUnless, click_options
from infer.config import GenerateConfig
from infer.memory import estimate as infer
from precompute.config import PrecomputeConfig
from precompute.memory import estimate as precompute
from train.config import TrainConfig
from train.memory import estimate as train

# By the section of a TOML file: the settings' class, and what counts a run's memory.
STAGES: dict[str, tuple[type[Any], Callable[[Any, int | None], Need]]] = {
    "precompute": (PrecomputeConfig, precompute.need),
    "train": (TrainConfig, train.need),
    "infer": (GenerateConfig, infer.need),
}
CARDS_GB = (6, 8, 12, 16, 24, 48, 80)


@dataclass(frozen=True)
class Row:
    """What a stage takes with a preset, or why the two do not go together."""

    stage: str
    preset: str
    need: Need | ConfigError

    def fits(self, card_bytes: int) -> bool:
        """Return whether a card of this size has room."""
        return isinstance(self.need, Need) and self.need.fits(card_bytes)


@click.command(cls=Command, context_settings=CONTEXT)
@click.option(
    "--config",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="TOML file with the base and the settings of the stages. Repeatable: later files win.",
)
@click.option("--pretrained-model-name-or-path", "base", help="Another base model.")
@click.option("--resolution", type=int, help="Side of the pictures in pixels.")
@click.option("--memory", type=click.FloatRange(min=1), help="The card's memory, as it is sold.")
@click.option(
    "--table", is_flag=True, help="The three published bases and cards of 6 to 80 GB, in Markdown."
)
def main(
    files: tuple[Path, ...],
    base: str | None,
    resolution: int | None,
    memory: float | None,
    table: bool,
) -> None:
    """Count what precompute, train and infer need with each preset of configs/cards/."""
    with user_errors():
        if table:
            print_table()
            return
        if memory is None:
            raise ConfigError("--memory: how many GB has the card? With make: MEMORY=8.")
        overrides = {"pretrained_model_name_or_path": base, "resolution": resolution}
        given = {name: value for name, value in overrides.items() if value is not None}
        with stage_settings(files, given) as settings:
            print_rows(count(settings, round(memory * GIB), {}), memory)


def count(
    settings: Mapping[str, dict[str, Any]], card_bytes: int, known: dict[Any, Need]
) -> Iterator[Row]:
    """Yield what each stage takes with each preset, the fastest first.

    Args:
        settings: of each stage.
        card_bytes: the memory by which `--offload auto` chooses.
        known: what was counted before, and is counted now.
    """
    for stage, (config_class, need) in STAGES.items():
        for preset in card_names():
            changes = settings_with(preset, stage, config_class)
            try:
                config = config_class(**empty(config_class) | settings[stage] | changes)
                free = card_bytes if getattr(config, "offload", None) == "auto" else None
                if (config, free) not in known:
                    known[config, free] = need(config, free)
                yield Row(stage, preset, known[config, free])
            except ConfigError as error:
                yield Row(stage, preset, error)


@contextlib.contextmanager
def stage_settings(
    files: tuple[Path, ...], overrides: Mapping[str, Any]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Give the settings of each stage; the later stages' pictures are those of the first.

    Args:
        files: TOML files, of which later ones win.
        overrides: settings that win over the files.
    """
    settings: dict[str, dict[str, Any]] = {}
    for stage, (config_class, _) in STAGES.items():
        settings[stage] = {}
        for file in files:
            settings[stage] |= read_section(file, stage, config_class)
        settings[stage] |= overrides
    first = settings["precompute"]
    data: dict[str, Any] = {
        name: first.get(name, getattr(PrecomputeConfig, name))
        for name in ("resolution", "max_sequence_length")
    }
    if "pretrained_model_name_or_path" not in first:
        raise ConfigError("--config or --pretrained-model-name-or-path: give a base model.")
    with configurations_of(str(first["pretrained_model_name_or_path"])) as folder:
        base: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        yield {stage: data | own | base for stage, own in settings.items()}


def empty(config_class: type[Any]) -> dict[str, Any]:
    """Return the settings of a run of which only the memory is asked."""
    needless = [one for one in click_options(config_class) if isinstance(one, RequiredUnless)]
    return {str(one.name): one.empty for one in needless} | {"estimate": True}


@contextlib.contextmanager
def configurations_of(base: str) -> Iterator[str]:
    """Give the folder of a published base's configurations; of another base its own name."""
    name = published(base)
    if name is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as folder:
        save_configurations(Path(folder), TRANSFORMERS[name])
        yield folder


def print_rows(rows: Iterable[Row], memory: float) -> None:
    """Print a line for each stage and preset, and for each stage the fastest that fits."""
    card_bytes = round(memory * GIB)
    click.echo(
        f"A card of {memory:g} GB has {memory:g} GiB, which are {card_bytes / GB:.2f} GB of 10^9 "
        f"bytes, as all figures here. It needs the tensors' bytes, {LOST_SHARE:.0%} lost between "
        f"them, and {CUDA_BYTES / GB:.1f} for CUDA; host memory includes "
        f"{PROCESS_BYTES / GB:.0f} for the process."
    )
    click.echo(f"\n{'stage':10}  preset  tensors  needs  host  fits")
    best: dict[str, Row | None] = {}
    for row in rows:
        best.setdefault(row.stage, None)
        start = f"{row.stage:10}  {row.preset:6}"
        if isinstance(row.need, ConfigError):
            click.echo(f"{start}  {row.need}")
            continue
        fits = row.fits(card_bytes)
        host = (row.need.host + PROCESS_BYTES) / GB
        click.echo(
            f"{start}  {row.need.device / GB:7.1f}  {row.need.free / GB:5.1f}  {host:4.1f}  "
            f"{'yes' if fits else 'no':4}  {row.need.chosen}".rstrip()
        )
        if fits and best[row.stage] is None:
            best[row.stage] = row
    click.echo()
    for stage, fastest in best.items():
        click.echo(f"{stage}: {_verdict(fastest, stage)}")


def _verdict(row: Row | None, stage: str) -> str:
    if row is None:
        return "does not fit with any preset"
    cost = gives_up(row.preset, stage)
    return f"fits with CARD={row.preset}" + (f", which gives up {cost}" if cost else "")


def print_table() -> None:
    """Print for each base, card and stage the fastest preset that fits, in Markdown."""
    click.echo("| base | card | " + " | ".join(STAGES) + " |")
    click.echo("|---" * (2 + len(STAGES)) + "|")
    for base in TRANSFORMERS:
        known: dict[Any, Need] = {}
        with stage_settings((Path(f"configs/{base}.toml"),), {}) as settings:
            for card in CARDS_GB:
                rows = list(count(settings, card * GIB, known))
                cells = [_cell(rows, stage, card * GIB) for stage in STAGES]
                click.echo(f"| {base} | {card} GB | " + " | ".join(cells) + " |")


def _cell(rows: list[Row], stage: str, card_bytes: int) -> str:
    for row in rows:
        if row.stage == stage and row.fits(card_bytes):
            assert isinstance(row.need, Need)
            host = f" and {row.need.host / GB:.0f} of host" if row.need.host > GB else ""
            return f"`{row.preset}`: {row.need.device / GB:.1f} GB{host}"
    return "no"


if __name__ == "__main__":
    main()
