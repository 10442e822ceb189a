"""Command lines and TOML files from frozen dataclasses: every option is defined in one place.

A stage's settings are the fields of its config dataclass, made with `option`. From them come the
click options (`--train-batch-size`), the keys of the stage's table in a TOML file
(`train_batch_size`), the defaults and the help. Flags win over the file, the file over defaults.
"""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click
from safetensors import SafetensorError

from shards.errors import ConfigError, ShardError

Config = TypeVar("Config")
RESOLUTION_STEP_PX = 16
MAX_SEQUENCE_LENGTH = 512
SECTIONS = ("precompute", "train", "infer")
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def option(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """Return a dataclass field that is also a command line option; no default means required."""
    return dataclasses.field(default=default, metadata={"help": help})


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
) -> click.Command:
    """Return the click command that fills `config_class` and calls `run` with it.

    Args:
        name: what the command is called in its own help.
        config_class: frozen dataclass whose fields were made with `option`; its docstring is
            the command's help.
        run: does the work; its ShardError, ConfigError and OSError end as one line, exit code 2.
        section: the table of the TOML file that this command reads.
        moved: see `StageCommand`.
    """

    def callback(config: Path | None, **values: Any) -> None:
        try:
            run(config_class(**values))
        except (ShardError, ConfigError) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(_os_error_line(error)) from error
        except SafetensorError as error:
            raise CommandError(f"a weight file is damaged ({error}); fetch it again") from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported for its name
                raise
            raise CommandError(
                f"out of memory: {str(error).splitlines()[0]} Smaller batches help, and "
                "--gradient-checkpointing in training."
            ) from error

    config_option = click.Option(
        ["--config"],
        type=click.Path(path_type=Path),
        is_eager=True,
        callback=lambda ctx, _, path: _use_config_file(ctx, path, section, config_class),
        help=f"TOML file; its [{section}] table gives defaults for the options below.",
    )
    return StageCommand(
        name,
        callback=callback,
        params=[config_option, *_click_options(config_class)],
        help=config_class.__doc__,
        context_settings=CONTEXT,
        moved=moved,
    )


def nearest(name: str, known: list[str]) -> str:
    """Return ' Did you mean …?' for the known name most like `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def pair_up(
    prompts: tuple[str, ...], images: tuple[Path, ...], prompt_flag: str, image_flag: str
) -> list[tuple[str, Path]]:
    """Return (prompt, image) pairs: as many of one as of the other, or one of either.

    Raises:
        ConfigError: the numbers do not go together; naming the two options.
    """
    all_prompts = prompts * len(images) if len(prompts) == 1 else prompts
    all_images = images * len(prompts) if len(images) == 1 else images
    if len(all_prompts) != len(all_images):
        raise ConfigError(
            f"{len(prompts)} {prompt_flag} and {len(images)} {image_flag}: give as many of one as "
            "of the other, or one of either."
        )
    return list(zip(all_prompts, all_images, strict=True))


def check_resolution(resolution: int) -> None:
    """Refuse sizes that SD3 cannot have: the VAE divides by 8, the transformer takes 2 x 2.

    Raises:
        ConfigError: with sizes that it can have.
    """
    if resolution <= 0 or resolution % RESOLUTION_STEP_PX:
        below = max(resolution // RESOLUTION_STEP_PX, 1) * RESOLUTION_STEP_PX
        raise ConfigError(
            f"--resolution {resolution}: must be divisible by {RESOLUTION_STEP_PX} (VAE f8, "
            f"patches of 2); try {below} or {below + RESOLUTION_STEP_PX}."
        )


def check_sequence_length(tokens: int) -> None:
    """Refuse T5 lengths that the stock pipeline refuses.

    Raises:
        ConfigError: with the bound.
    """
    if not 1 <= tokens <= MAX_SEQUENCE_LENGTH:
        raise ConfigError(
            f"--max-sequence-length {tokens}: must be 1 to {MAX_SEQUENCE_LENGTH}, which is as "
            "long as diffusers' pipeline takes."
        )


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values, for `run.json` and checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in dataclasses.asdict(config).items()}


def _click_options(config_class: type[Any]) -> list[click.Option]:
    hints = get_type_hints(config_class)
    return [_click_option(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def _click_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    multiple, kind = _unwrap(hint)
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


def _unwrap(hint: Any) -> tuple[bool, Any]:
    """Return (repeatable, element type) of a field's annotation."""
    if get_origin(hint) is tuple:
        return True, get_args(hint)[0]
    if get_origin(hint) in (types.UnionType, Union):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    return False, hint


def _click_type(kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    if kind is Path:
        return click.Path(path_type=Path)
    return kind


def _use_config_file(
    ctx: click.Context, path: Path | None, section: str, config_class: type[Any]
) -> Path | None:
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **read_section(path, section, config_class)}
    return path


def read_section(path: Path, section: str, config_class: type[Any]) -> dict[str, Any]:
    """Return the settings of one stage from a TOML file, checked against its config class.

    Raises:
        CommandError: the file cannot be read, is not TOML, or holds an unknown table or key or a
            value of another type.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"--config {path}: not valid TOML: {error}") from error
    for name in document:
        if name not in SECTIONS:
            raise CommandError(f"{path}: unknown table [{name}].{nearest(name, list(SECTIONS))}")
    hints = get_type_hints(config_class)
    settings: dict[str, Any] = {}
    table = document.get(section, {})
    if not isinstance(table, dict):
        raise CommandError(f"{path}: {section} must be a table, [{section}], found {table!r}.")
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise CommandError(
                f"{path}: unknown key {key!r} in [{section}].{nearest(name, list(hints))}"
            )
        settings[name] = _checked(value, hints[name], f"{path}: {key} in [{section}]")
    return settings


def _checked(value: Any, hint: Any, where: str) -> Any:
    multiple, kind = _unwrap(hint)
    if multiple:
        if not isinstance(value, list):
            raise CommandError(f"{where}: expected a list, found {value!r}.")
        return [_checked(item, kind, where) for item in value]
    choices = get_args(kind) if get_origin(kind) is Literal else None
    expected = type(choices[0]) if choices else str if kind is Path else kind
    # TOML tells 1 from 1.0 and from true; only an integer where a float is meant is harmless.
    fits = type(value) is expected or (expected is float and type(value) is int)
    if not fits:
        raise CommandError(f"{where}: expected {expected.__name__}, found {value!r}.")
    if choices and value not in choices:
        raise CommandError(f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}.")
    return str(value) if choices else value


def _os_error_line(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
