"""Command lines: click commands that fill a config dataclass and end users' errors in one line.

Flags win over TOML files, files over the dataclass's defaults.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import click
from safetensors import SafetensorError

from common.cards import AUTO, card_names, choose_card, free_memory_of, settings_with
from common.config_file import aliases, read_section, switches
from common.errors import (
    ConfigError,
    RunError,
    ShardError,
    is_raised_everywhere,
    os_error_line,
)
from common.memory.need import Need
from common.options import RequiredUnless, click_options, flag, headings

Config = TypeVar("Config")
# An argument that is no option: it begins with no dash, or is a negative number.
VALUE = re.compile(r"(?!-)|-\.?\d")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class CommandError(click.ClickException):
    """A user's mistake: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line, on the first process alone if all of a launch end with it."""
        is_first = os.environ.get("RANK", "0") == "0"
        if is_first or not is_raised_everywhere(self):
            super().show(file)


class Command(click.Command):
    """A click command that names everything required that is missing, not only the first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            click.UsageError: required options or arguments are missing.
        """
        try:
            return super().parse_args(ctx, list(args))
        except click.MissingParameter as error:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            missing = [
                parameter
                for parameter in self.params
                if parameter.required
                and not (isinstance(parameter, RequiredUnless) and parameter.is_needless(ctx))
                and parameter.value_is_missing(parameter.consume_value(ctx, given)[0])
            ]
            raise click.UsageError(_missing_line(missing, ctx), ctx) from error


def _missing_line(missing: list[click.Parameter], ctx: click.Context) -> str:
    """Return `Missing option '--cache'.`, or one line for all that is missing."""
    parts = []
    for kind in ("argument", "option"):
        names = [one.get_error_hint(ctx) for one in missing if one.param_type_name == kind]
        if names:
            parts.append(f"{kind}{'s' if len(names) > 1 else ''} {', '.join(names)}")
    return f"Missing {' and '.join(parts)}."


class Group(click.Group):
    """A group whose commands are of our class."""

    command_class = Command


class StageCommand(Command):
    """A click command with grouped help that also reads the diffusers scripts' spelling.

    `--train_batch_size` is `--train-batch-size`. An option that may be repeated also takes its
    values in a row: `--validation_prompt "one" "two"`.

    Args:
        config_class: the dataclass whose fields are the options.
        misplaced: flags that this command does not have, and where each belongs. All that a
            command line holds are reported at once.
    """

    def __init__(
        self, *args: Any, config_class: type[Any], misplaced: Mapping[str, str], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.headings = headings(config_class)
        self.aliases = {flag(alias): flag(name) for alias, name in aliases(config_class).items()}
        self.switches = {
            prefix + name.replace("_", "-"): (flag(field), values[given])
            for name, (field, values) in switches(config_class).items()
            for prefix, given in (("--", True), ("--no-", False))
        }
        self.misplaced = misplaced

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite `args` to click's own form, then parse them.

        Raises:
            CommandError: options belong to another command.
        """
        flags = [argument_flag(arg).replace("--no-", "--", 1) for arg in args]
        if found := {name: self.misplaced[name] for name in flags if name in self.misplaced}:
            raise CommandError("\n  ".join(f"{name}: {where}" for name, where in found.items()))
        return super().parse_args(ctx, self._rewritten(args))

    def _rewritten(self, args: list[str]) -> list[str]:
        """Return arguments with the options' own names, and one name for each repeated value."""
        repeatable = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        rewritten: list[str] = []
        spelt: dict[str, str] = {}
        current = ""
        num_values = 0  # since the name of the current option
        for arg in args:
            if name := argument_flag(arg):
                _, equals, value = arg.partition("=")
                current = self.aliases.get(name, name)
                if name in self.switches:
                    if equals:
                        raise CommandError(f"{name}: takes no value.")
                    equals = "="
                    current, value = self.switches[name]
                if spelt.setdefault(current, name) != name:
                    raise CommandError(f"{spelt[current]} and {name} are one option; give one.")
                rewritten.append(current + equals + value)
                num_values = 1 if equals else 0
            else:
                if current in repeatable and num_values and VALUE.match(arg):
                    rewritten.append(current)
                rewritten.append(arg)
                num_values += 1
        return rewritten

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        records = {
            parameter.name or "": record
            for parameter in self.get_params(ctx)
            if (record := parameter.get_help_record(ctx))
        }
        sections: dict[str, list[tuple[str, str]]] = {}
        for name, heading in self.headings.items():
            lines = sections.setdefault(heading, [])
            if name == "estimate" and "card" in records:  # both are about a device's memory
                lines.append(records.pop("card"))
            lines.append(records.pop(name))
        sections["General"] = list(records.values())
        for heading, lines in sections.items():
            with formatter.section(heading):
                formatter.write_dl(lines)


def argument_flag(argument: str) -> str:
    """Return an argument's option name with dashes, or an empty string if it names none."""
    if not argument.startswith("--") or argument == "--":
        return ""
    return "--" + argument[2:].partition("=")[0].replace("_", "-")


def stage_command(
    name: str,
    config_class: type[Config],
    run: Callable[[Config], None],
    *,
    section: str,
    misplaced: Mapping[str, str] | None = None,
    like: Callable[[Path], dict[str, Any]] | None = None,
    need: Callable[[Config, int | None], Need] | None = None,
) -> click.Command:
    """Return the click command that fills `config_class` and calls `run` with it.

    Args:
        name: the command's name in its own help.
        config_class: frozen dataclass whose fields were made with `option`; its docstring is
            the command's help.
        run: does the work; its errors end as `user_errors` says.
        section: the table of the TOML file that this command reads.
        misplaced: flags that this command does not have, and where each belongs.
        like: returns the settings that a file was made with. If given, the command has an option
            `--like FILE`, which takes these settings as defaults.
        need: returns the memory that a run takes, where so many bytes of the device are free. If
            given, the command has an option `--card`.
    """

    def callback(
        config: tuple[Path, ...],
        like: Path | None = None,
        card: str | None = None,
        **values: Any,
    ) -> None:
        with user_errors():
            if need is None or card is None:
                run(config_class(**values))
            else:
                run(_with_card(card, values, section, config_class, need))

    params = [_config_option(section, config_class)]
    if need is not None:
        params.append(_card_option(section))
    if like is not None:
        params.append(_like_option(like))
    return StageCommand(
        name,
        callback=callback,
        params=[*params, *click_options(config_class)],
        help=config_class.__doc__,
        context_settings=CONTEXT,
        config_class=config_class,
        misplaced=misplaced or {},
    )


def _config_option(section: str, config_class: type[Any]) -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        multiple=True,
        callback=lambda ctx, _, paths: _use_config_files(ctx, paths, section, config_class),
        help=f"TOML file; its [{section}] table gives defaults for all options. "
        "Repeatable: later files win.",
    )


def _card_option(section: str) -> click.Option:
    return click.Option(
        ["--card"],
        help=f"Preset for a graphics card: the [{section}] table of configs/cards/CARD.toml, over "
        "those of --config; or auto, the fastest that fits the free memory.",
    )


def _with_card(
    card: str,
    values: dict[str, Any],
    section: str,
    config_class: type[Config],
    need: Callable[[Config, int | None], Need],
) -> Config:
    """Return the settings with a card's preset; what the command line gives wins over it."""
    ctx = click.get_current_context()
    own = {
        name
        for name in values
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    } | set(ctx.meta.get("settings", {}).get("like", {}))

    def settings(name: str) -> Config:
        changes = settings_with(name, section, config_class)
        try:
            return config_class(**values | {key: changes[key] for key in changes.keys() - own})
        except ConfigError as error:
            raise ConfigError(f"with --card {name}: {error}") from error

    if card != AUTO:
        return settings(card)
    free = free_memory_of(values.get("device"))
    if free is None:
        click.echo("--card auto: no graphics card computes here; nothing is changed")
        return config_class(**values)
    configs: dict[str, Config | ConfigError] = {}
    for name in card_names():
        try:
            configs[name] = settings(name)
        except ConfigError as error:
            configs[name] = error
    name, line = choose_card(configs, need, free, section)
    click.echo(line)
    return settings(name)


def _like_option(like: Callable[[Path], dict[str, Any]]) -> click.Option:
    return click.Option(
        ["--like"],
        type=click.Path(path_type=Path),
        is_eager=True,
        callback=lambda ctx, _, path: _use_settings_of(ctx, path, like),
        help="A picture; all options are what it was drawn with, unless they are given.",
    )


def _use_config_files(
    ctx: click.Context, paths: tuple[Path, ...], section: str, config_class: type[Any]
) -> tuple[Path, ...]:
    for path in paths:
        with user_errors():
            settings = read_section(path, section, config_class)
        _take_for_defaults(ctx, "config", settings)
    return paths


def _use_settings_of(
    ctx: click.Context, path: Path | None, like: Callable[[Path], dict[str, Any]]
) -> Path | None:
    if path is not None:
        with user_errors():
            settings = like(path)
        _take_for_defaults(ctx, "like", settings)
    return path


def _take_for_defaults(ctx: click.Context, origin: str, settings: dict[str, Any]) -> None:
    """Use settings as defaults; those of `--like` win over those of `--config`."""
    given = ctx.meta.setdefault("settings", {"config": {}, "like": {}})
    given[origin] |= settings
    ctx.default_map = {**given["config"], **given["like"]}


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that a user can meet into a `CommandError`: one line, exit code 2."""
    try:
        yield
    except (ShardError, ConfigError, RunError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(os_error_line(error)) from error
    except SafetensorError as error:
        raise CommandError(f"a weight file is damaged ({error}); fetch it again") from error
    except RuntimeError as error:
        from common.memory.exhausted import first_line, is_out_of_memory  # imports torch

        if not is_out_of_memory(error):
            raise
        raise CommandError(
            f"out of memory: {first_line(error)} Other programs may hold a part of it; "
            "which options take less, says --help."
        ) from error
