"""The user's own annotators: modules, files, classes, and what they are known by."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from common.errors import ConfigError, RunError
from sd3.annotators.annotator import Annotator
from sd3.annotators.drawing import Drawing
from sd3.annotators.registry import find_annotator
from sd3.images import BadImage
from tests.sd3.annotators.conftest import picture_of

INVERTED = """
from PIL import ImageOps


def drawn(image, strength=1.0, weights=""):
    if strength < 0:
        raise ValueError("two\\nlines")
    return ImageOps.invert(image) if strength else image


def needing(image, level):
    return image.point(lambda value: level)
"""
BATCHES = """
from PIL import ImageOps


class Inverted:
    def __init__(self, device, level=3):
        self.device, self.level, self.sizes = device, level, []
        if level == 6:
            raise OSError("no\\nweights")

    def batch(self, images):
        self.sizes.append(len(images))
        if any(image.getpixel((0, 0)) == (1, 2, 3) for image in images):
            raise ValueError("cannot be drawn")
        if self.level == 4:
            return images[:-1]
        return [ImageOps.invert(image) for image in images]


class Idle:
    pass
"""


def same(one: object, other: Image.Image) -> bool:
    return isinstance(one, Image.Image) and one.tobytes() == other.tobytes()


def draw(annotator: Annotator, images: Sequence[Image.Image], device: str = "cpu") -> list[Any]:
    return list(Drawing(annotator, device).draw(images))


def test_a_file_is_the_same_annotator_as_a_module(folder: Path, tmp_path: Path) -> None:
    (folder / "inverted_a.py").write_text(INVERTED)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "renamed.py").write_text(INVERTED)
    by_module = find_annotator("inverted_a:drawn")
    by_file = find_annotator(f"{elsewhere / 'renamed.py'}:drawn")
    assert by_module.identity == by_file.identity
    image = picture_of(1)
    for annotator in (by_module, by_file):
        assert same(*draw(annotator, [image]), ImageOps.invert(image))


def test_what_lies_beside_a_file_is_imported_and_counts(tmp_path: Path, folder: Path) -> None:
    for text in ("offset = 1\n", "offset = 2\n"):
        (tmp_path / "beside_own_file.py").write_text(text)
        (tmp_path / "own_file.py").write_text(
            "import beside_own_file\n\ndef drawn(image):\n    return image\n"
        )
        identity = find_annotator(f"{tmp_path / 'own_file.py'}:drawn").identity
        assert len(identity) == 3
        if text == "offset = 1\n":
            first = identity
    assert identity[:2] == first[:2]
    assert identity[2] != first[2]


HELPED = """
import helper_of_both
from helpers_of_both.deep import level as deep
from numpy import uint8


def drawn(image):
    import helpers_of_both.lazy as lazy

    return image.point(lambda value: helper_of_both.level() + deep + lazy.level)
"""


def test_helpers_of_one_name_are_each_files_own(tmp_path: Path, folder: Path) -> None:
    found = []
    for level in (1, 2):
        place = tmp_path / str(level)
        (place / "helpers_of_both").mkdir(parents=True)
        for name, text in (
            ("helped.py", HELPED),
            ("helper_of_both.py", "import other_of_both\nlevel = lambda: other_of_both.level\n"),
            ("other_of_both.py", f"level = {level}\n"),
            ("helpers_of_both/__init__.py", ""),
            ("helpers_of_both/deep.py", f"level = {10 * level}\n"),
            ("helpers_of_both/lazy.py", f"level = {100 * level}\n"),
        ):
            (place / name).write_text(text)
        found.append(find_annotator(f"{place / 'helped.py'}:drawn"))
    levels = [draw(annotator, [picture_of(0)])[0].getpixel((0, 0)) for annotator in found]
    assert levels == [(111,) * 3, (222,) * 3]
    # Its own and five more files; the helper, the helpers' first file and its own text are alike.
    first, second = (annotator.identity for annotator in found)
    assert len(first) == len(second) == 1 + 6
    assert len(set(first) & set(second)) == 1 + 3


def test_what_lies_beside_a_file_replaces_no_library(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise RuntimeError('taken')\n")
    (tmp_path / "careful.py").write_text("import numpy\n\ndef drawn(image):\n    return image\n")
    assert len(find_annotator(f"{tmp_path / 'careful.py'}:drawn").identity) == 2


def test_a_file_that_fails_is_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "failing_i.py").write_text("import beside_i\n")
    (tmp_path / "beside_i.py").write_text("raise RuntimeError('no weights')\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"py:drawn: fails \(RuntimeError: no weights\)"):
            find_annotator(f"{tmp_path / 'failing_i.py'}:drawn")


def test_arguments_of_ones_own_count_if_they_are_not_the_defaults(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "inverted_b.py").write_text(INVERTED)
    plain = find_annotator("inverted_b:drawn")
    assert find_annotator("inverted_b:drawn", ["strength=1"]).identity == plain.identity
    other = find_annotator("inverted_b:drawn", ["strength=0"])
    assert other.identity != plain.identity
    image = picture_of(2)
    assert same(*draw(other, [image]), image)
    # A file counts by its bytes: the name is no part of the identity.
    monkeypatch.chdir(folder)
    found = []
    for name in ("one.bin", "two.bin"):
        (folder / name).write_bytes(b"weights")
        found.append(find_annotator("inverted_b:drawn", [f"weights={name}"]))
    assert found[0].identity == found[1].identity != plain.identity
    assert [one.files for one in found] == [[folder / "one.bin"], [folder / "two.bin"]]
    (folder / "listed_b.py").write_text("def drawn(image, weights=None):\n    return image\n")
    listed = find_annotator("listed_b:drawn", ['weights=["one.bin", "a word"]'])
    assert listed.files == [folder / "one.bin"]
    other_word = find_annotator("listed_b:drawn", ['weights=["one.bin", "another"]'])
    assert listed.identity != other_word.identity


def test_what_a_code_takes_by_default_is_not_recorded(folder: Path) -> None:
    """It would come back from JSON as something else."""
    (folder / "defaults_b.py").write_text(
        "def draw(image, mask=None, sides=(3, 3), level=1):\n"
        "    assert mask is None and sides == (3, 3)\n    return image\n"
    )
    recorded = find_annotator("defaults_b:draw", ["level=2"]).arguments
    assert recorded == {"level": 2}
    again = find_annotator("defaults_b:draw", json.loads(json.dumps(recorded)))
    assert same(*draw(again, [picture_of(1)]), picture_of(1))


def test_a_class_draws_batches_on_the_device(folder: Path) -> None:
    (folder / "batches_c.py").write_text(BATCHES)
    annotator = find_annotator("batches_c:Inverted", ["level=5"])
    assert annotator.in_batches
    assert annotator.arguments == {"level": 5}
    images = [picture_of(seed) for seed in range(3)]
    assert annotator.load is not None
    bound = annotator.load("cuda:3")
    one: Any = bound.__self__  # type: ignore[attr-defined]
    assert (one.device, one.level) == ("cuda:3", 5)
    drawing = Drawing(annotator, "cpu")
    for image, found in zip(images, drawing.draw(images), strict=True):
        assert same(found, ImageOps.invert(image))


def test_any_number_of_pictures_is_drawn_in_batches_of_one_size(folder: Path) -> None:
    (folder / "batches_h.py").write_text(BATCHES)
    drawing = Drawing(find_annotator("batches_h:Inverted"), "cpu")
    images = [picture_of(seed) for seed in range(9)]
    images += [picture_of(seed, (64, 96)) for seed in range(2)] + [picture_of(9)]
    for image, found in zip(images, drawing.draw_all(iter(images)), strict=True):
        assert same(found, ImageOps.invert(image))
    assert drawing._draw is not None
    one: Any = drawing._draw.__self__  # type: ignore[attr-defined]
    assert one.sizes == [8, 1, 2, 1]


def test_one_picture_that_fails_does_not_take_the_batch_with_it(folder: Path) -> None:
    (folder / "batches_d.py").write_text(BATCHES)
    images = [picture_of(seed) for seed in range(3)]
    images[1].putpixel((0, 0), (1, 2, 3))
    found = draw(find_annotator("batches_d:Inverted"), images)
    assert same(found[0], ImageOps.invert(images[0]))
    assert same(found[2], ImageOps.invert(images[2]))
    assert isinstance(found[1], BadImage)
    assert "ValueError: cannot be drawn" in str(found[1])
    with pytest.raises(ConfigError, match=r"Inverted: cannot be loaded \(OSError: no weights\)"):
        draw(find_annotator("batches_d:Inverted", ["level=6"]), images)
    short = draw(find_annotator("batches_d:Inverted", ["level=4"]), images[:1])
    assert "0 pictures come back for 1" in str(short[0])


def test_a_function_that_fails_is_a_reason(folder: Path) -> None:
    (folder / "inverted_e.py").write_text(INVERTED)
    (found,) = draw(find_annotator("inverted_e:drawn", ["strength=-1"]), [picture_of(0)])
    assert str(found) == "no conditioning image from it (ValueError: two lines)"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "inverted_f:drawn",
            ["strenght=1"],
            "unknown to inverted_f:drawn. Known: strength, weig",
        ),
        ("inverted_f:drawn", ["strength=much"], "inverted_f:drawn expects float."),
        ("inverted_f:needing", [], "inverted_f:needing: needs --conditioning-args level=…."),
        ("inverted_f:nothing", [], "inverted_f has no such function."),
        ("inverted_f.py:drawn", [], "--conditioning-from inverted_f.py:drawn: no such file."),
        ("./nowhere_f.py:drawn", [], "--conditioning-from ./nowhere_f.py:drawn: no such file."),
        ("nowhere_f:drawn", [], "nowhere_f cannot be imported (ModuleNotFoundError"),
        (
            ":drawn",
            [],
            "--conditioning-from :drawn: expected package.module:name or path/to/file.py",
        ),
        (
            "inverted_f:",
            [],
            "--conditioning-from inverted_f:: expected package.module:name or path",
        ),
        (".inverted_f:drawn", [], "expected package.module:name or path/to/file.py:name."),
        ("batches_f:Idle", [], "the class has no batch(images); give one, or a function."),
    ],
)
def test_what_is_wrong_is_one_line(
    folder: Path, name: str, arguments: list[str], message: str
) -> None:
    (folder / "inverted_f.py").write_text(INVERTED)
    (folder / "batches_f.py").write_text(BATCHES)
    with pytest.raises(ConfigError) as raised:
        find_annotator(name, arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_argument_that_is_needed_can_be_given(folder: Path) -> None:
    (folder / "inverted_g.py").write_text(INVERTED)
    (found,) = draw(find_annotator("inverted_g:needing", ["level=77"]), [picture_of(0)])
    assert found.getpixel((3, 3)) == (77, 77, 77)


class Network:
    """A network on a device that holds so many pictures at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.given: list[int] = []

    def annotator(self) -> Annotator:
        return Annotator("net", {}, [], load=lambda _: self.draw)

    def draw(self, images: Sequence[Image.Image]) -> Sequence[Image.Image]:
        self.given.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried it.\nmore")
        return images


def test_where_a_batch_does_not_fit_each_is_drawn_alone(picture: Image.Image) -> None:
    network = Network(1)
    drawn = Drawing(network.annotator(), "cuda:0").draw([picture] * 3)
    assert [isinstance(one, Image.Image) for one in drawn] == [True] * 3
    assert network.given == [3, 1, 1, 1]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")],
)
@pytest.mark.parametrize(("device", "helps"), [("cuda:0", "--device cpu"), ("cpu", "more memory")])
def test_a_full_memory_is_no_bad_picture(
    picture: Image.Image, error: RuntimeError, device: str, helps: str
) -> None:
    def fail(_: object) -> Any:
        raise error

    says = rf"the annotator net: memory is full \({error}\)\. What helps: .*{helps}\."
    with pytest.raises(RunError, match=says):
        Drawing(Annotator("net", {}, [], load=fail), device)
    with pytest.raises(RunError, match=says):
        Drawing(Annotator("net", {}, [], load=lambda _: fail), device).draw([picture] * 2)
