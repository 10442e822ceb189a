"""Bases without T5: SD3 also draws with its two CLIP encoders alone, and zeros for T5's embedding.

The stock pipeline does so if `text_encoder_3` is None. T5-XXL takes 9.5 GB of disk in 16 bit.
"""

import json
from pathlib import Path

from common.errors import ConfigError

T5_COMPONENTS = ("tokenizer_3", "text_encoder_3")


def uses_t5(base: str, *, wanted: bool) -> bool:
    """Return whether prompts are encoded by T5 too.

    Args:
        base: as `--pretrained-model-name-or-path` names it.
        wanted: unless `--no-t5` is given.

    Raises:
        ConfigError: its model_index.json is damaged.
    """
    return wanted and lists_t5(base)


def lists_t5(base: str) -> bool:
    """Return whether a base has T5, as far as its model_index.json is here and says.

    A folder that merely lacks its files is damaged, and not a base without T5.

    Args:
        base: as `--pretrained-model-name-or-path` names it.

    Raises:
        ConfigError: the file is damaged.
    """
    path = Path(base) / "model_index.json"
    if not path.is_file():
        return True
    try:
        listed = json.loads(path.read_text(encoding="utf-8")).get("text_encoder_3", [None])
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).") from error
    return bool(listed) and listed[0] is not None
