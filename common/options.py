"""Command lines from frozen dataclasses: every option is defined in one place.

A stage's settings are the fields of its config dataclass, made with `option`. From them come the
click options (`--train-batch-size`), the keys of the stage's table in a TOML file
(`train_batch_size`), the defaults and the help. Flags win over the file, the file over defaults.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
from safetensors import SafetensorError

from common.config_file import NUMBER_OR_WORD, read_section, unwrap
from common.errors import ConfigError, RunError, ShardError

Config = TypeVar("Config")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def option(default: Any = dataclasses.MISSING, *, help: str, secret: bool = False) -> Any:
    """Return a dataclass field that is also a command line option.

    Args:
        default: none means required.
        help: one or two sentences.
        secret: whether it is kept out of what is written down.
    """
    return dataclasses.field(default=default, metadata={"help": help, "secret": secret})


class CommandError(click.ClickException):
    """An error of the user's making: one line on stderr, exit code 2."""

    exit_code = 2


class StageCommand(click.Command):
    """A click command that also reads option names and lists as the diffusers scripts write them.

    `--train_batch_size` is `--train-batch-size`, and an option that may be repeated also takes its
    values in a row: `--validation_prompt "one" "two"`. `moved` maps options of the reference
    script that live elsewhere now to the sentence that says where.
    """

    def __init__(self, *args: Any, moved: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moved = moved or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite `args` to click's own form, then parse them."""
        repeatable = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        rewritten: list[str] = []
        current = ""
        values_in_a_row = 0
        for arg in args:
            if arg.startswith("--") and arg != "--":
                name, equals, value = arg.partition("=")
                current = "--" + name[2:].replace("_", "-")
                if current in self.moved:
                    raise CommandError(f"{current}: {self.moved[current]}")
                rewritten.append(current + equals + value)
                values_in_a_row = 1 if equals else 0
            else:
                if current in repeatable and values_in_a_row and not arg.startswith("-"):
                    rewritten.append(current)
                rewritten.append(arg)
                values_in_a_row += 1
        return super().parse_args(ctx, rewritten)


def stage_command(
    name: str,
    config_class: type[Config],
    run: Callable[[Config], None],
    *,
    section: str,
    moved: dict[str, str] | None = None,
    like: Callable[[Path], dict[str, Any]] | None = None,
) -> click.Command:
    """Return the click command that fills `config_class` and calls `run` with it.

    Args:
        name: what the command is called in its own help.
        config_class: frozen dataclass whose fields were made with `option`; its docstring is
            the command's help.
        run: does the work; its errors end as `user_errors` says.
        section: the table of the TOML file that this command reads.
        moved: see `StageCommand`.
        like: returns the settings that a file was made with; `--like FILE` then takes them for
            defaults.
    """

    def callback(config: tuple[Path, ...], like: Path | None = None, **values: Any) -> None:
        with user_errors():
            run(config_class(**values))

    config_option = click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        multiple=True,
        callback=lambda ctx, _, paths: _use_config_files(ctx, paths, section, config_class),
        help=f"TOML file; its [{section}] table gives defaults for the options below. Of several "
        "the later ones win.",
    )
    like_option = click.Option(
        ["--like"],
        type=click.Path(path_type=Path),
        is_eager=True,
        callback=lambda ctx, _, path: _use_settings_of(ctx, path, like),
        help="A picture; the options below are what it was drawn with, unless they are given.",
    )
    return StageCommand(
        name,
        callback=callback,
        params=[
            config_option,
            *([like_option] if like is not None else []),
            *_click_options(config_class),
        ],
        help=config_class.__doc__,
        context_settings=CONTEXT,
        moved=moved,
    )


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """End the errors that a user can meet as a `CommandError`: one line, exit code 2."""
    try:
        yield
    except (ShardError, ConfigError, RunError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(os_error_line(error)) from error
    except SafetensorError as error:
        raise CommandError(f"a weight file is damaged ({error}); fetch it again") from error
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported for its name
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
    flag = "--" + field.name.replace("_", "-")
    required = field.default is dataclasses.MISSING
    if kind is bool:
        return click.Option(
            [f"{flag}/--no-{flag[2:]}"],
            default=field.default,
            help=field.metadata["help"],
            show_default=True,
        )
    return click.Option(
        [flag],
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
    ctx: click.Context, path: Path | None, like: Callable[[Path], dict[str, Any]] | None
) -> Path | None:
    if path is not None and like is not None:
        with user_errors():
            settings = like(path)
        _take_for_defaults(ctx, "like", settings)
    return path


def _take_for_defaults(ctx: click.Context, origin: str, settings: dict[str, Any]) -> None:
    """Have settings stand where no flag is given; those of `--like` win over `--config`'s."""
    given = ctx.meta.setdefault("settings", {"config": {}, "like": {}})
    given[origin] |= settings
    ctx.default_map = {**given["config"], **given["like"]}


def os_error_line(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
