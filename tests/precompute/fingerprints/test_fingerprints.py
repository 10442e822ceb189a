"""What is encoded again when one thing changes: all of it, or nothing."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from PIL import Image

from precompute.config import PrecomputeConfig
from precompute.planning import identities as planning
from precompute.run import precompute
from sd3.annotators.registry import find_annotator
from shards.format.expected_cache import read_expected
from tests.conftest import NUM_ROWS
from tests.precompute.test_again import Encoded, again, encoded, tars  # noqa: F401

Forms = dict[str, tuple[Any, Any]]
ALL_IMAGES = {"latents": NUM_ROWS, "conditioning": NUM_ROWS}
ALL_TEXT = {"text": NUM_ROWS + 1}  # with the empty prompt
DRAWING = """
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

WEIGHTS = Path(__file__).parent / "weights" / "threshold.npy"


def drawn(image):
    from {helper} import inverted

    return inverted(image).point(lambda value: 255 * (value > np.load(WEIGHTS)[0]))
"""
HELPING = """
from PIL import ImageOps


def inverted(image):
    return ImageOps.invert(image)
"""
PLAIN = """
from PIL import ImageOps


def drawn(image):
    return ImageOps.invert(image)
"""


def as_former_versions_did(patch: pytest.MonkeyPatch) -> None:
    """Have identities written as they were."""

    def formerly(_: Path, forms: Forms) -> list[Any]:
        return [former for _, former in forms.values()]

    patch.setattr(planning, "identities_in_use", formerly)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Write a module that can be imported; return its name."""
    folder, written = tmp_path / "modules", []
    (folder / "weights").mkdir(parents=True)
    np.save(folder / "weights" / "threshold.npy", np.array([100]))
    monkeypatch.syspath_prepend(folder)

    def write(name: str, source: str) -> str:
        written.append(name)
        (folder / f"{name}.py").write_text(source)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def own_base(again: PrecomputeConfig, tmp_path: Path) -> PrecomputeConfig:  # noqa: F811
    base = shutil.copytree(again.pretrained_model_name_or_path, tmp_path / "base")
    return replace(again, pretrained_model_name_or_path=str(base))


def tokenizer_files(config: PrecomputeConfig) -> list[Path]:
    base = Path(config.pretrained_model_name_or_path)
    return list(base.glob("tokenizer*/*.json"))


def test_a_tokenizer_saved_again_changes_nothing_and_another_one_the_text(
    own_base: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
) -> None:
    files = tokenizer_files(own_base)
    assert len(files) >= 3
    for path in files:
        text = json.dumps(json.loads(path.read_text()), indent=7, ensure_ascii=True)
        assert text != path.read_text()
        path.write_text(text)
    precompute(own_base)
    assert encoded.taken() == {}
    path = next(path for path in files if path.name == "tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clean_up_spaces": True}))
    precompute(own_base)
    assert encoded.taken() == ALL_TEXT


@pytest.mark.slow
def test_a_cache_that_a_former_version_made_is_kept(
    own_base: PrecomputeConfig,
    encoded: Encoded,  # noqa: F811
    modules: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = replace(own_base, conditioning_from=f"{modules('plain_drawing', PLAIN)}:drawn")
    shutil.rmtree(drawn.cache)
    with monkeypatch.context() as patch:
        as_former_versions_did(patch)
        precompute(drawn)
    encoded.taken()
    identity = read_expected(drawn.cache)[0].products["text"].identity
    by_hand = xxhash.xxh3_128()
    for path in sorted((Path(drawn.pretrained_model_name_or_path) / "tokenizer").iterdir()):
        by_hand.update(path.name.encode() + xxhash.xxh3_128_digest(path.read_bytes()))
    assert identity["tokenizer"] == by_hand.hexdigest()
    before = tars(drawn)
    for plan in (True, False):
        if not plan:
            (drawn.cache / "plan.safetensors").unlink()
        precompute(drawn)
        assert encoded.taken() == {}
        assert tars(drawn) == before
    precompute(replace(drawn, max_sequence_length=24))
    assert encoded.taken() == ALL_TEXT


@pytest.mark.slow
def test_rounding_to_tensorfloat_32_counts_where_float32_is_computed(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
) -> None:
    precompute(replace(again, allow_tf32=False))
    assert encoded.taken() == ALL_TEXT | ALL_IMAGES
    precompute(replace(again, allow_tf32=False))
    assert encoded.taken() == {}
    half = replace(again, text_dtype="bfloat16", vae_dtype="bfloat16")
    precompute(half)
    assert encoded.taken() == ALL_TEXT | ALL_IMAGES
    precompute(replace(half, allow_tf32=False))
    assert encoded.taken() == {}


@pytest.mark.slow
def test_a_module_and_weights_that_an_annotator_uses_count_and_its_name_does_not(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
    modules: Callable[..., str],
    tmp_path: Path,
) -> None:
    helper = modules("drawing_helper", HELPING)
    source = DRAWING.format(helper=helper)
    drawn = replace(again, conditioning_from=f"{modules('my_drawing', source)}:drawn")
    precompute(drawn)
    assert encoded.taken() == {"conditioning": NUM_ROWS}
    precompute(replace(drawn, conditioning_from=f"{modules('renamed_drawing', source)}:drawn"))
    assert encoded.taken() == {}
    modules("drawing_helper", HELPING + "# edited\n")
    precompute(drawn)
    assert encoded.taken() == {"conditioning": NUM_ROWS}
    np.save(tmp_path / "modules" / "weights" / "threshold.npy", np.array([200]))
    precompute(drawn)
    assert encoded.taken() == {"conditioning": NUM_ROWS}
    precompute(drawn)
    assert encoded.taken() == {}


@pytest.mark.slow
def test_what_a_former_version_did_not_know_of_an_annotator_is_drawn_again(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
    modules: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = DRAWING.format(helper=modules("another_helper", HELPING))
    drawn = replace(again, conditioning_from=f"{modules('helped_drawing', source)}:drawn")
    found = find_annotator(str(drawn.conditioning_from))
    before = {"conditioning_range": "-1_1", "drawn_by": found.former}

    def formerly(cache: Path, forms: Forms) -> list[Any]:
        text, latents, _ = (now for now, _ in forms.values())
        return [text, latents, latents | before]

    with monkeypatch.context() as patch:
        patch.setattr(planning, "identities_in_use", formerly)
        precompute(drawn)
    encoded.taken()
    precompute(drawn)
    assert encoded.taken() == {"conditioning": NUM_ROWS}


def test_two_functions_of_one_module_are_two_annotators(modules: Callable[..., str]) -> None:
    source = PLAIN + "\n\ndef other(image):\n    return image\n\n\nsame = drawn\n"
    name = modules("two_drawings", source)
    drawn, other, same = (find_annotator(f"{name}:{one}") for one in ("drawn", "other", "same"))
    assert [one.identity[0] for one in (drawn, other, same)] == ["drawn", "other", "drawn"]
    assert drawn.identity[1:] == other.identity[1:] == same.identity[1:]


def test_rows_that_become_held_out_are_encoded_and_no_others(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
) -> None:
    precompute(replace(again, validation_rows=2))
    assert encoded.taken() == {"latents": 2, "conditioning": 2}


@pytest.mark.slow
def test_the_background_counts_for_transparent_pictures_alone(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
) -> None:
    config = replace(again, validation_prompt=(), validation_image=())
    precompute(config)
    precompute(replace(config, background="#2060a0"))
    assert encoded.taken() == {}
    source = Path(str(config.source))
    for name in ("target/2.png", "target/9.png", "source/4.png"):
        with Image.open(source / name) as image:
            image.putalpha(100)
            image.save(source / name)
    precompute(config)
    latents = {2, 9}
    changed = {"latents": len(latents), "conditioning": len(latents | {4})}
    assert encoded.taken() == changed
    for background in ("#2060a0", "white"):
        precompute(replace(config, background=background))
        assert encoded.taken() == changed
    precompute(replace(config, background="#ffffff"))
    assert encoded.taken() == {}


@pytest.mark.slow
def test_a_transparent_validation_image_is_kept_over_the_same_colour(
    again: PrecomputeConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGBA", (64, 64), (0, 90, 0, 100)).save(tmp_path / "clear.png")
    pair = {"validation_prompt": ("a",), "validation_image": (tmp_path / "clear.png",)}
    config = replace(again, background="red", **pair)
    shutil.rmtree(config.cache)
    with monkeypatch.context() as patch:
        as_former_versions_did(patch)
        precompute(config)
    for background, kept in (("red", 1), ("#FF0000", 1), ("#fe0000", 0)):
        capsys.readouterr()
        precompute(replace(config, background=background))
        said = capsys.readouterr().out
        assert f"validation/conditioning: 1 records in 1 shards, {kept} kept" in said
