"""The photographs to try one's own data with."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from tests.conftest import Outcome


def test_thirty_photographs_with_captions_are_written(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "photos"
    outcome = command("demo.photographs", "--output-dir", folder)
    assert outcome.exit_code == 0, outcome.output
    assert "30 photographs with captions written" in outcome.output
    pictures, captions = sorted(folder.glob("*.png")), sorted(folder.glob("*.txt"))
    assert len(list(folder.iterdir())) == 60
    assert [path.stem for path in pictures] == [path.stem for path in captions]
    assert len({path.read_text() for path in captions}) == 30
    cat = np.asarray(Image.open(folder / "chelsea-right.png"))
    whole = skimage.data.chelsea()
    assert np.array_equal(cat, whole[:, whole.shape[1] // 2 :][:, : cat.shape[1]])
    assert (folder / "chelsea-right.txt").read_text() == "the face of a tabby cat, right half\n"


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    (tmp_path / "mine.png").touch()
    outcome = command("demo.photographs", "--output-dir", tmp_path)
    assert outcome.exit_code == 2
    assert "give a new or an empty folder" in outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]
