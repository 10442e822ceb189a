"""What a model card says of the base model: names that mean something elsewhere."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checks import for_each
from sd3.base.contents import read_contents
from sd3.base.find import FLAG
from sd3.base.lora import find_file, reads_as_it_is
from sd3.pretrained import is_hub_id
from sd3.single_file import is_one_file
from train.config import TrainConfig


@dataclass(frozen=True)
class CardBase:
    """The base model of a run, without paths of this machine.

    Attributes:
        name: of the folder, or its hub id.
        hub_id: None if its folder tells none.
        transformer: name of the checkpoint whose transformer was in its place; None without one.
        loras: name and strength of each LoRA that was merged into it, and whether diffusers reads
            its names.
        settings: the options that say all this.
    """

    name: str
    hub_id: str | None
    transformer: str | None
    loras: list[tuple[str, float, bool]]
    settings: dict[str, Any]

    @property
    def in_words(self) -> str:
        """What the ControlNet is for."""
        words = self.hub_id or f"the base model {self.name!r}"
        if self.transformer:
            words += f" with the transformer of `{self.transformer}`"
        merged = [f"`{name}` merged at {scale:g}" for name, scale, _ in self.loras]
        return f"{words}, with {' and '.join(merged)}" if merged else words


def card_base(config: TrainConfig) -> CardBase:
    """Return what a card says of a run's base model."""
    given, transformer = config.pretrained_model_name_or_path, config.transformer
    name_or_path = given
    if is_one_file(given):
        name_or_path = config.single_file_config or read_contents(Path(given), FLAG).published
        transformer = transformer or Path(given)
    loras = [_outside(name) for name in config.lora]
    scales = for_each(config.lora_scale, len(loras))
    read = [reads_as_it_is(find_file(name, config.cache_dir)) for name in config.lora]
    return CardBase(
        name=_outside(name_or_path),
        hub_id=hub_name(name_or_path),
        transformer=transformer.name if transformer else None,
        loras=list(zip(loras, scales, read, strict=True)),
        settings={
            "pretrained_model_name_or_path": hub_name(given),
            "single_file_config": hub_name(config.single_file_config or ""),
            "transformer": transformer.name if transformer else None,
            "lora": loras or None,
            "lora_scale": scales or None,
        },
    )


def _outside(name: str) -> str:
    """Return a hub id, or the name of a file or folder of this machine."""
    return Path(name).name if Path(name).exists() else name


def hub_name(name_or_path: str) -> str | None:
    """Return a base model's name on the hub, e.g. `owner/name`; None if its folder tells none."""
    folder = Path(name_or_path)
    if folder.is_file() or not name_or_path:  # a fine-tune's may look like the published one
        return None
    if not folder.is_dir():
        return name_or_path
    if name := _name_in(str(folder.resolve())):
        return name
    # diffusers notes there what a model was loaded from.
    for path in (folder / "model_index.json", folder / "transformer" / "config.json"):
        try:
            loaded_from = str(json.loads(path.read_text(encoding="utf-8")).get("_name_or_path"))
        except (OSError, ValueError, AttributeError):
            continue
        if is_hub_id(loaded_from) and not Path(loaded_from).exists():
            return loaded_from
        if name := _name_in(loaded_from):
            return name
    return None


def _name_in(path: str) -> str | None:
    """Return the name in the path of a copy that huggingface_hub keeps of a repository."""
    found = re.search(r"\bmodels--([^/\\]+?)--([^/\\]+)", path)
    return f"{found[1]}/{found[2]}" if found else None
