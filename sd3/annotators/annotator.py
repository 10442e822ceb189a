"""What an annotator is: how it draws, and what its drawings depend on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

# From a picture, resized and cropped, to its conditioning image.
Draw = Callable[[Image.Image], Image.Image]
DrawBatch = Callable[[Sequence[Image.Image]], Sequence[Image.Image]]


@dataclass(frozen=True)
class Annotator:
    """Draws conditioning images: one at a time by a function, or batches by a network.

    Attributes:
        name: as the user gives it.
        arguments: all that change what it draws: of ours with those that were not given, of the
            user's own only those that are not the code's defaults.
        function: draws one picture, in any thread; None if `load` is there.
        load: returns what draws a batch on a device, e.g. `cuda:0`, once the network is there.
        identity: what the drawings depend on, files aside: the name of its code, hashes, arguments.
        files: on whose bytes the drawings depend, too.
        folders: on whose files they depend, at any depth, with their names in the folder.
        models: folders of models, on whose weights and configuration they depend.
        former: how former versions of this program identified it.
    """

    name: str
    arguments: dict[str, Any]
    identity: list[str]
    function: Draw | None = None
    load: Callable[[str], DrawBatch] | None = None
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)
    former: list[str] = field(default_factory=list)

    @property
    def in_batches(self) -> bool:
        """Whether it draws batches, on a device."""
        return self.load is not None
