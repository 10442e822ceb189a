"""Settings as fields of frozen dataclasses: every option is defined in one place.

A stage's settings are the fields of its config dataclass, made with `option`. From them come the
click options (`--train-batch-size`), the keys of the stage's table in a TOML file
(`train_batch_size`), the defaults and the help.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from common.config_file import NUMBER_OR_WORD, unwrap
from common.errors import ConfigError


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    heading: str | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
    unless: str | None = None,
    switches: Mapping[str, str] | None = None,
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
        unless: a flag's field name; if the flag is given, this option is not required, and empty.
        switches: flags, as field names, each with the value of this option that it stands for.
            Where one is false, it stands for the default. `--help` does not list them.
    """
    metadata = {
        "help": help,
        "heading": heading,
        "aliases": aliases,
        "secret": secret,
        "unless": unless,
        "switches": switches or {},
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return the command line's spelling of a field name: `--train-batch-size`."""
    return "--" + name.replace("_", "-")


def as_arguments(settings: Mapping[str, Any]) -> str:
    """Return settings as they are written on a command line: `--train-batch-size 4`."""

    def argument(name: str, value: Any) -> str:
        if value is True:
            return flag(name)
        return f"{flag(name)} {value:g}" if value == 0 else f"{flag(name)} {value}"

    return " ".join(argument(*setting) for setting in settings.items())


def split_arguments(name: str, texts: Sequence[str], example: str) -> list[tuple[str, str, str]]:
    """Return (text, key, value) of each of an option's `key=value` texts.

    Args:
        name: of the option, as on the command line.
        texts: its values.
        example: of one, for errors.

    Raises:
        ConfigError: a text has no key or no `=`, or a key comes twice.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ConfigError(f"{name} {text}: expected key=value, for instance {example}.")
        if key in found:
            raise ConfigError(f"{name} {text}: {key} is given twice.")
        found[key] = text, key, value.strip()
    return list(found.values())


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


def click_options(config_class: type[Any]) -> list[click.Option]:
    """Return the click options for the fields of a config dataclass, in their order."""
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    options = [_click_option(field, hints[field.name]) for field in fields]
    first = {field.metadata["unless"] for field in fields}
    for option in options:
        option.is_eager = option.name in first
    return options


class RequiredUnless(click.Option):
    """A required option that is empty, and not missed, where a flag is given.

    Args:
        unless: name of the flag, which click must process earlier.
        empty: the value then.
    """

    def __init__(self, *args: Any, unless: str, empty: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unless, self.empty = unless, empty

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, which says without which flag it is required."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        return record[0], record[1].replace("[required]", f"[required unless {flag(self.unless)}]")

    def is_needless(self, ctx: click.Context) -> bool:
        """Return whether the flag is given; the context has processed it by now."""
        return bool(ctx.params.get(self.unless))

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        """Return the value as its type.

        Raises:
            click.MissingParameter: neither this option nor the flag is given.
        """
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter:
            if not self.is_needless(ctx):
                raise
            return self.empty


def _click_option(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    multiple, kind = unwrap(hint)
    name, text = flag(field.name), field.metadata["help"]
    if kind is bool:
        names = [f"{name}/--no-{name[2:]}"]
        return click.Option(names, default=field.default, help=text, show_default=True)
    if unless := field.metadata["unless"]:
        empty = () if multiple else kind()
        return RequiredUnless(
            [name],
            type=_click_type(kind),
            multiple=multiple,
            required=True,
            help=text,
            unless=unless,
            empty=empty,
        )
    if field.default is dataclasses.MISSING:
        # Without any default: click takes even None for a value, and then misses nothing.
        return click.Option(
            [name], type=_click_type(kind), multiple=multiple, required=True, help=text
        )
    return click.Option(
        [name],
        type=_click_type(kind),
        multiple=multiple,
        default=field.default,
        show_default=field.default not in (None, ()),
        help=text,
    )


def integer_or_auto(value: str) -> int | str:
    """Return a number, or `auto`; click shows the name of this function in the help."""
    try:
        return value if value == "auto" else int(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a whole number nor auto.") from error


def number(value: str) -> float:
    """Return a finite number; click shows the name of this function in the help."""
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise click.BadParameter(f"{value!r} is not a finite number.")
    return found


def _click_type(kind: Any) -> Any:
    if kind in NUMBER_OR_WORD:
        return integer_or_auto
    if get_origin(kind) is Literal:
        return click.Choice([str(choice) for choice in get_args(kind)])
    if kind is Path:
        return click.Path(path_type=Path)
    return number if kind is float else kind


def headings(config_class: type[Any]) -> dict[str, str]:
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
