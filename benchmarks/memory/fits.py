"""`python -m benchmarks.memory.fits`: what all stages need of a card, and whether it has it.

Counted from configurations alone: there need be no weights, no cache and no GPU. Of the three
published bases not even the configurations are downloaded. `--table` prints the table of
docs/training.md.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import click

from benchmarks.bases import TRANSFORMERS, published
from common.cards import PROCESS_BYTES, card_names, gives_up, settings_with
from common.checks import check_resolution, check_sequence_length
from common.command import CONTEXT, Command, user_errors
from common.config_file import read_section
from common.errors import ConfigError
from common.memory.need import CUDA_BYTES, GB, GIB, LOST_SHARE, RESERVED_SHARE, Need, card_bytes
from common.memory.processes import map_in_processes
from common.options import RequiredUnless, click_options, number
from infer.config import GenerateConfig
from precompute.config import PrecomputeConfig
from sd3.buckets import bucket_shapes
from train.config import TrainConfig

# The settings' classes, by the section of a TOML file.
STAGES: dict[str, type[Any]] = {
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "infer": GenerateConfig,
}
BASE = "pretrained_model_name_or_path"
# What the first stage's settings say for all.
SIZES = ("resolution", "max_sequence_length")
# Settings of what stages make, which need not be there yet. infer's cache is never opened to count:
# it only spares the text encoders.
MADE = {"train": ("cache",), "infer": ("controlnet", "combine", "width", "height")}
CARDS_GB = (6, 8, 12, 16, 24, 48, 80)
LARGEST_CARD_GB = 10_000


@dataclass(frozen=True)
class Row:
    """What a stage takes with a preset, or why the two do not go together."""

    stage: str
    preset: str
    need: Need | ConfigError

    def fits(self, free: int) -> bool:
        """Return whether a card with so many bytes free has room."""
        return isinstance(self.need, Need) and self.need.fits(free)


def card_gb(value: str) -> float:
    """Return a card's memory from `8` or `8GB`; click shows this function's name in the help."""
    found = number(value.lower().removesuffix("gb"))
    if not 1 <= found <= LARGEST_CARD_GB:
        raise click.BadParameter(f"{value!r} is not in 1 to {LARGEST_CARD_GB:,}.")
    return found


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
@click.option("--memory", type=card_gb, help="The card's memory, as it is sold: 8 or 8GB.")
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
        overrides = {BASE: base, "resolution": resolution}
        own = read_settings(files, {k: v for k, v in overrides.items() if v is not None})
        settings = one_data_set(own)
        for line in remarks(own, settings):
            click.echo(line)
        with one_base(settings) as found:
            print_rows(count(found, card_bytes(memory), {}), memory)


def count(
    settings: Mapping[str, dict[str, Any]], free: int, known: dict[Any, Need | ConfigError]
) -> Iterator[Row]:
    """Yield what each stage takes with each preset, the fastest first.

    Args:
        settings: of each stage.
        free: bytes of the card that are free, by which `--offload auto` chooses.
        known: what was counted before, and is counted now.

    Raises:
        ConfigError: a stage can be counted with no preset, for one reason.
    """
    asked = [
        (stage, preset, _question(stage, preset, settings[stage], free))
        for stage in STAGES
        for preset in card_names()
    ]
    missing = [one for one in dict.fromkeys(one for _, _, one in asked) if one not in known]
    estimates()  # imports torch here, and not in each process
    answers = map_in_processes(_answer, missing)
    for stage, questions in itertools.groupby(asked, itemgetter(0)):
        rows = []
        for _, preset, one in questions:
            if one not in known:
                known[one] = next(answers)
            rows.append(Row(stage, preset, known[one]))
        reasons = {str(row.need) if isinstance(row.need, ConfigError) else None for row in rows}
        if len(reasons) == 1 and (reason := reasons.pop()):
            raise ConfigError(f"{stage} could not be counted: {reason}")
        yield from rows


def _question(stage: str, preset: str, settings: dict[str, Any], free: int) -> Any:
    """Return the arguments of `need` for a stage and a preset, or why they do not go together."""
    config_class = STAGES[stage]
    changes = settings_with(preset, stage, config_class)
    try:
        config = config_class(**empty(config_class) | settings | changes)
    except ConfigError as error:
        return error
    return config, free if getattr(config, "offload", None) == "auto" else None


def _answer(question: Any) -> Need | ConfigError:
    """Return what `need` says, or why it cannot say it."""
    if isinstance(question, ConfigError):
        return question
    try:
        return need(*question)
    except ConfigError as error:
        return error


def need(config: Any, free: int | None) -> Need:
    """Return the memory that a stage takes."""
    return estimates()[type(config)](config, free)


def estimates() -> dict[type[Any], Callable[[Any, int | None], Need]]:
    """Return each stage's estimate, by the class of its settings."""
    # Imported only once the command line is known to be good: torch takes seconds.
    from infer.memory import estimate as infer
    from precompute.memory import estimate as precompute
    from train.memory import estimate as train

    return {
        PrecomputeConfig: precompute.need,
        TrainConfig: train.need,
        GenerateConfig: infer.need,
    }


def read_settings(
    files: tuple[Path, ...], overrides: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return each stage's own settings.

    Args:
        files: TOML files, of which later ones win.
        overrides: settings that win over the files.

    Raises:
        ConfigError: a file is wrong; there is no base, or more than one.
    """
    settings: dict[str, dict[str, Any]] = {}
    for stage, config_class in STAGES.items():
        settings[stage] = {}
        for file in files:
            settings[stage] |= read_section(file, stage, config_class)
        settings[stage] |= overrides
    bases = {stage: own[BASE] for stage, own in settings.items() if BASE in own}
    if not bases:
        raise ConfigError("--config or --pretrained-model-name-or-path: give a base model.")
    if len(set(bases.values())) > 1:
        listed = ", ".join(f"[{stage}] {base}" for stage, base in bases.items())
        raise ConfigError(
            f"all stages are counted with one base, and these differ: {listed}. Give one with "
            "--pretrained-model-name-or-path (with make: BASE)."
        )
    return {stage: own | {BASE: next(iter(bases.values()))} for stage, own in settings.items()}


def one_data_set(own: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the stages' settings for data, cache and ControlNet that need not be there yet.

    Raises:
        ConfigError: SD3 has no such size.
    """
    first = own["precompute"]
    sizes = {name: first.get(name, getattr(PrecomputeConfig, name)) for name in SIZES}
    check_resolution(sizes["resolution"])
    check_sequence_length(sizes["max_sequence_length"])
    return {
        stage: {name: value for name, value in one.items() if name not in MADE.get(stage, ())}
        | sizes
        for stage, one in own.items()
    }


def remarks(
    own: Mapping[str, dict[str, Any]], settings: Mapping[str, dict[str, Any]]
) -> Iterator[str]:
    """Yield what is counted, and which of the stages' own settings are not, in lines."""
    first = settings["precompute"]
    side = first["resolution"]
    yield f"{first[BASE]}, squares of {side} px, {first['max_sequence_length']} T5 tokens"
    if first.get("buckets") and (shapes := bucket_shapes(side)):
        more = max(width * height for width, height in shapes) / side**2 - 1
        yield (
            f"train and infer are counted with squares; the largest bucket has {more:.0%} more "
            "pixels"
        )
    ignored = [
        f"{name} of [{stage}]"
        for stage, one in own.items()
        for name, value in one.items()
        if settings[stage].get(name) != value
    ]
    if ignored:
        yield f"not looked at: {', '.join(ignored)}"


@contextlib.contextmanager
def one_base(
    settings: Mapping[str, dict[str, Any]],
) -> Iterator[dict[str, dict[str, Any]]]:
    """Give the settings with a folder of configurations in the place of a published base."""
    with configurations_of(str(settings["precompute"][BASE])) as folder:
        yield {stage: one | {BASE: folder} for stage, one in settings.items()}


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
    from benchmarks.random_weights import save_configurations  # imports torch

    with tempfile.TemporaryDirectory() as folder:
        save_configurations(Path(folder), TRANSFORMERS[name])
        yield folder


def print_rows(rows: Iterable[Row], memory: float) -> None:
    """Print a line for each stage and preset, and for each stage the fastest that fits."""
    free = card_bytes(memory)
    rows = iter(rows)
    rows = itertools.chain([next(rows)], rows)  # nothing is printed if nothing can be counted
    click.echo(
        f"A card of {memory:g} GB has {memory:g} GiB, which are {memory * GIB / GB:.2f} GB of 10^9 "
        f"bytes, as all figures here; {free / GB:.2f} without the {RESERVED_SHARE:.0%} that a "
        f"display and the driver take. It needs the tensors' bytes, {LOST_SHARE:.0%} lost between "
        f"them, and {CUDA_BYTES / GB:.1f} for CUDA; host memory includes "
        f"{PROCESS_BYTES / GB:.0f} for the process."
    )
    click.echo(f"\n{'stage':10}  preset  tensors  needs  host  fits")
    verdicts = []
    for stage, grouped in itertools.groupby(rows, attrgetter("stage")):
        listed = list(grouped)
        for row in listed:
            click.echo(_line(row, free))
        verdicts.append(f"{stage}: {_verdict(listed, free)}")
    click.echo("\n" + "\n".join(verdicts))


def _line(row: Row, free: int) -> str:
    start = f"{row.stage:10}  {row.preset:6}"
    if isinstance(row.need, ConfigError):
        return f"{start}  {row.need}"
    host = (row.need.host + PROCESS_BYTES) / GB
    return (
        f"{start}  {row.need.device / GB:7.1f}  {row.need.free / GB:5.1f}  {host:4.1f}  "
        f"{'yes' if row.fits(free) else 'no':4}  {row.need.chosen}".rstrip()
    )


def _verdict(rows: list[Row], free: int) -> str:
    """Return whether a stage fits, by its rows, the fastest first."""
    for row in rows:
        if row.fits(free):
            cost = gives_up(row.preset, row.stage)
            return f"fits with CARD={row.preset}" + (f", which gives up {cost}" if cost else "")
    counted = [row for row in rows if isinstance(row.need, Need)]
    if not counted:
        return "could not be counted with any preset"
    if len(counted) < len(rows):
        return f"does not fit with the {len(counted)} of {len(rows)} presets that could be counted"
    return "does not fit with any preset"


def print_table() -> None:
    """Print for each base, card and stage the fastest preset that fits, in Markdown."""
    click.echo("| base | card | " + " | ".join(STAGES) + " |")
    click.echo("|---" * (2 + len(STAGES)) + "|")
    for base in TRANSFORMERS:
        known: dict[Any, Need | ConfigError] = {}
        own = read_settings((Path(f"configs/{base}.toml"),), {})
        with one_base(one_data_set(own)) as settings:
            for card in CARDS_GB:
                free = card_bytes(card)
                rows = list(count(settings, free, known))
                cells = [_cell(rows, stage, free) for stage in STAGES]
                click.echo(f"| {base} | {card} GB | " + " | ".join(cells) + " |")


def _cell(rows: list[Row], stage: str, free: int) -> str:
    for row in rows:
        if row.stage == stage and row.fits(free):
            assert isinstance(row.need, Need)
            host = f" and {row.need.host / GB:.0f} of host" if row.need.host > GB else ""
            return f"`{row.preset}`: {row.need.device / GB:.1f} GB{host}"
    return "no"


if __name__ == "__main__":
    main()
