"""The ControlNets that draw a picture: one alone, or several combined."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from infer.config import PipelineConfig
from infer.convention import Convention, find_convention
from infer.drawing.metadata import digest_of
from infer.pipeline import COMPONENTS, TEXT_COMPONENTS, find_models, short_titles
from sd3.pretrained import read_config


@dataclass(frozen=True)
class ControlNetSet:
    """ControlNets that draw a picture together: one, or several combined.

    Attributes:
        title: short unique name.
        names: folders or hub ids, as the user gave them.
        folders: folder of each.
        conventions: convention of each; all have the same sizes and token length.
        digests: digest of each one's weights and configuration.
    """

    title: str
    names: tuple[str, ...]
    folders: tuple[Path, ...]
    conventions: tuple[Convention, ...]
    digests: tuple[str, ...]

    @property
    def convention(self) -> Convention:
        """The first convention; the others may differ from it in what becomes of controls alone."""
        return self.conventions[0]


def find_controlnet_sets(
    config: PipelineConfig, *, with_text_encoders: bool
) -> tuple[Path, list[ControlNetSet]]:
    """Return the base model's folder, and a set for each ControlNet.

    Args:
        config: settings of the run.
        with_text_encoders: whether the base model must have its text encoders.

    Raises:
        ConfigError: a model cannot be found, or a ControlNet does not fit the base.
    """
    components = [name for name in COMPONENTS if with_text_encoders or name not in TEXT_COMPONENTS]
    base, folders = find_models(config, config.controlnet, components)
    titles = short_titles(config.controlnet)
    sets = [
        ControlNetSet(
            title=title,
            names=(name,),
            folders=(folder,),
            conventions=(find_convention(config, base, name, folder),),
            digests=(digest_of(folder),),
        )
        for title, name, folder in zip(titles, config.controlnet, folders, strict=True)
    ]
    return base, sets


def combine(sets: Sequence[ControlNetSet]) -> ControlNetSet:
    """Return one set of the ControlNets of several.

    Raises:
        ConfigError: two ControlNets need different call settings, of which the pipeline takes one.
    """
    if all(part.convention.inpainting for part in sets):
        raise ConfigError("--combine: ControlNets for inpainting draw alone; leave it out.")
    _check_call_settings(sets)
    return ControlNetSet(
        title="combined",
        names=tuple(chain.from_iterable(part.names for part in sets)),
        folders=tuple(chain.from_iterable(part.folders for part in sets)),
        conventions=tuple(chain.from_iterable(part.conventions for part in sets)),
        digests=tuple(chain.from_iterable(part.digests for part in sets)),
    )


def _check_call_settings(sets: Sequence[ControlNetSet]) -> None:
    first = _call_settings(sets[0])
    for other in sets[1:]:
        settings = _call_settings(other)
        if wrong := [key for key, value in settings.items() if value != first[key]]:
            raise ConfigError(
                f"--combine: {other.names[0]} must be called otherwise than {sets[0].names[0]} "
                f"({', '.join(f'{key} {settings[key]}, not {first[key]}' for key in wrong)})."
            )


def _call_settings(controlnets: ControlNetSet) -> dict[str, Any]:
    """Return the settings that one pipeline call shares between all its ControlNets."""
    saved = read_config(controlnets.folders[0], "")
    return {
        "zero pooled embeddings": saved.get("force_zeros_for_pooled_projection", True),
        "for inpainting": controlnets.convention.inpainting,
        "takes text": saved.get("joint_attention_dim") is not None,
        "max_sequence_length": controlnets.convention.max_sequence_length,
        "sizes": controlnets.convention.sizes,
    }
