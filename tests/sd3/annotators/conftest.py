"""Pictures to draw from, a miniature that estimates depth, and a double of controlnet-aux."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps


@pytest.fixture
def picture() -> Image.Image:
    """A picture of many colours, 96 x 64."""
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8))
    return coarse.resize((96, 64), Image.Resampling.BICUBIC)


def picture_of(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """A picture of coarse random colours."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own, whose modules can be imported."""
    before, path = set(sys.modules), list(sys.path)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.syspath_prepend(own)
    yield own
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


class DoubleDetector:
    """As controlnet-aux's: weights from a file, 512 pixels unless told otherwise."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self.device = "nowhere"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_or_path: str,
        filename: str | None = None,
        subfolder: str | None = None,
        local_files_only: bool = False,
    ) -> "DoubleDetector":
        path = Path(pretrained_model_or_path) / (subfolder or "") / (filename or "weights.pth")
        if not path.is_file():
            raise OSError(f"no weights at {path}\nand more lines")
        network = torch.nn.Linear(1, 1)
        network.load_state_dict(torch.load(path))
        return cls(network)

    def to(self, device: str) -> "DoubleDetector":
        self.device = device
        return self

    def __call__(
        self,
        input_image: Image.Image,
        detect_resolution: int = 512,
        image_resolution: int = 512,
        scribble: bool = False,
        **kwargs: object,
    ) -> Image.Image:
        grey = input_image.convert("1" if scribble else "L")
        ratio = image_resolution / min(grey.size)
        return grey.resize([round(side * ratio) for side in grey.size])


class DoubleShuffle:
    """As the package's shuffle: no weights, and random."""

    def __call__(self, input_image: Image.Image, output_type: str = "pil") -> Image.Image:
        pixels = np.asarray(input_image).copy()
        np.random.shuffle(pixels)
        turned: Image.Image = Image.fromarray(pixels)
        return turned if random.random() < 0.5 else ImageOps.flip(turned)


@pytest.fixture
def controlnet_aux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package of that name with one detector; return the folder of its weights."""
    DoubleDetector.__module__ = "controlnet_aux.double"
    package, processor = ModuleType("controlnet_aux"), ModuleType("controlnet_aux.processor")
    package.DoubleDetector = DoubleDetector  # type: ignore[attr-defined]
    processor.MODELS = {  # type: ignore[attr-defined]
        "scribble_double": {"class": DoubleDetector, "checkpoint": True},
        "shuffle": {"class": DoubleShuffle, "checkpoint": False},
    }
    processor.MODEL_PARAMS = {"scribble_double": {"scribble": True}}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "controlnet_aux", package)
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", processor)
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(1, 1).state_dict(), tmp_path / "weights.pth")
    return tmp_path
