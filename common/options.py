"""Command lines from frozen dataclasses: every option is defined in one place.

A stage's settings are the fields of its config dataclass, made with `option`. From them come the
click options (`--train-batch-size`), the keys of the stage's table in a TOML file
(`train_batch_size`), the defaults and the help. Flags win over the file, the file over defaults.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from safetensors import SafetensorError

from common.config_file import NUMBER_OR_WORD, read_section, unwrap
from common.errors import ConfigError, RunError, ShardError

Config = TypeVar("Config")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    heading: str | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Return a dataclass field that is also a command line option.

    Args:
        default: the option is required if this is missing.
        help: one or two sentences.
        heading: of the group in `--help` that begins with this option. Options without one
            belong to the group before them.
        aliases: further names, as field names. Command lines and TOML files may use them;
            `--help` does not list them.
        secret: whether to leave the value out of `run.json` and of checkpoints.
    """
    metadata = {"help": help, "heading": heading, "aliases": aliases, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return the command line's spelling of a field name: `--train-batch-size`."""
    return "--" + name.replace("_", "-")


class CommandError(click.ClickException):
    """A user's mistake: one line on stderr, exit code 2."""

    exit_code = 2


class StageCommand(click.Command):
    """A click command with grouped help that also reads the diffusers scripts' spelling.

    `--train_batch_size` is `--train-batch-size`. An option that may be repeated also takes its
    values in a row: `--validation_prompt "one" "two"`.

    Args:
        config_class: the dataclass whose fields are the options.
        elsewhere: flags that this command does not have, and where each belongs. All that a
            command line holds are reported at once.
    """

    def __init__(
        self, *args: Any, config_class: type[Any], elsewhere: Mapping[str, str], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        fields = dataclasses.fields(config_class)
        self.headings = _headings(config_class)
        self.aliases = {
            flag(alias): flag(field.name) for field in fields for alias in field.metadata["aliases"]
        }
        self.elsewhere = elsewhere

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite `args` to click's own form, then parse them.

        Raises:
            CommandError: options belong to another command.
        """
        flags = [argument_flag(arg) for arg in args]
        if misplaced := {name: self.elsewhere[name] for name in flags if name in self.elsewhere}:
            raise CommandError("\n  ".join(f"{name}: {where}" for name, where in misplaced.items()))
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
        current = ""
        num_values = 0  # since the name of the current option
        for arg in args:
            if name := argument_flag(arg):
                _, equals, value = arg.partition("=")
                current = self.aliases.get(name, name)
                rewritten.append(current + equals + value)
                num_values = 1 if equals else 0
            else:
                if current in repeatable and num_values and not arg.startswith("-"):
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
            sections.setdefault(heading, []).append(records.pop(name))
        sections["General"] = list(records.values())
        for heading, lines in sections.items():
            with formatter.section(heading):
                formatter.write_dl(lines)


def _headings(config_class: type[Any]) -> dict[str, str]:
    """Return the heading of each option, in the order of the help.

    A subclass's own options come before those that it inherits.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    headings: dict[str, str] = {}
    for cls in config_class.__mro__:
        current = "Options"
        for name in inspect.get_annotations(cls):
            if name in fields and name not in headings:
                current = fields[name].metadata["heading"] or current
                headings[name] = current
    return headings


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
    elsewhere: Mapping[str, str] | None = None,
    like: Callable[[Path], dict[str, Any]] | None = None,
) -> click.Command:
    """Return the click command that fills `config_class` and calls `run` with it.

    Args:
        name: the command's name in its own help.
        config_class: frozen dataclass whose fields were made with `option`; its docstring is
            the command's help.
        run: does the work; its errors end as `user_errors` says.
        section: the table of the TOML file that this command reads.
        elsewhere: see `StageCommand`.
        like: returns the settings that a file was made with. If given, the command has an option
            `--like FILE`, which takes these settings as defaults.
    """

    def callback(config: tuple[Path, ...], like: Path | None = None, **values: Any) -> None:
        with user_errors():
            run(config_class(**values))

    params = [_config_option(section, config_class)]
    if like is not None:
        params.append(_like_option(like))
    return StageCommand(
        name,
        callback=callback,
        params=[*params, *_click_options(config_class)],
        help=config_class.__doc__,
        context_settings=CONTEXT,
        config_class=config_class,
        elsewhere=elsewhere or {},
    )


def _config_option(section: str, config_class: type[Any]) -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        multiple=True,
        callback=lambda ctx, _, paths: _use_config_files(ctx, paths, section, config_class),
        help=f"TOML file; its [{section}] table gives defaults for the options below. "
        "Repeatable: later files win.",
    )


def _like_option(like: Callable[[Path], dict[str, Any]]) -> click.Option:
    return click.Option(
        ["--like"],
        type=click.Path(path_type=Path),
        is_eager=True,
        callback=lambda ctx, _, path: _use_settings_of(ctx, path, like),
        help="A picture; the options below are what it was drawn with, unless they are given.",
    )


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
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing torch takes seconds
            raise
        raise CommandError(
            f"out of memory: {str(error).splitlines()[0]} Smaller batches help, and "
            "--gradient-checkpointing in training."
        ) from error


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values, for `run.json` and checkpoints; without secrets."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {
        field.name: plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if not field.metadata.get("secret")
    }


def _click_options(config_class: type[Any]) -> list[click.Option]:
    hints = get_type_hints(config_class)
    return [_click_option(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _click_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    multiple, kind = unwrap(hint)
    name = flag(field.name)
    required = field.default is dataclasses.MISSING
    if kind is bool:
        return click.Option(
            [f"{name}/--no-{name[2:]}"],
            default=field.default,
            help=field.metadata["help"],
            show_default=True,
        )
    return click.Option(
        [name],
        type=_click_type(kind),
        multiple=multiple,
        required=required,
        default=None if required else field.default,
        show_default=not required and field.default not in (None, ()),
        help=field.metadata["help"],
    )


def integer_or_auto(value: str) -> int | str:
    """Return a number, or `auto`; click shows the name of this function in the help."""
    try:
        return value if value == "auto" else int(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a whole number nor auto.") from error


def _click_type(kind: Any) -> Any:
    if kind in NUMBER_OR_WORD:
        return integer_or_auto
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    if kind is Path:
        return click.Path(path_type=Path)
    return kind


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


def os_error_line(error: OSError) -> str:
    """Return an operating system's error as one line, with the file's name if it has one."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
