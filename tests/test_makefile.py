"""make says when it would not look at a variable."""

import subprocess

import pytest

from tests.conftest import REPOSITORY, without_make

FAST = "FAST=1 is configs/demo-fast.toml; give it or CONFIG=configs/demo.toml, not both"
CARD = "CARD=12gb is for make precompute, train, infer, score and serve; leave it out"


def make(*words: str) -> tuple[int, str, str]:
    """Return exit code, complaints and output of make, which only prints what it would do."""
    command = ["make", "--dry-run", *words]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=without_make()
    )
    return done.returncode, done.stderr, done.stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("demo", "FAST=1", "CONFIG=configs/demo.toml"), FAST),
        (("demo", "CARD=12gb"), CARD),
        (("verify", "CACHE=cache", "CARD=12gb"), CARD),
        (("fits", "MEMORY=8", "SOURCE=my photos"), "SOURCE=my photos: make fits does not look at"),
        (("fits", "MEMORY=8", "BASE=sd3", "CACHE=cache"), "CACHE=cache: make fits does not look"),
        (("fits", "MEMORY=8", "OUTPUT=out"), "OUTPUT=out: make fits does not look at it"),
    ],
)
def test_a_variable_that_is_not_looked_at_is_refused(
    words: tuple[str, ...], complaint: str
) -> None:
    code, said, _ = make(*words)
    assert code == 2
    assert complaint in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (("precompute", "SOURCE=photos"), "precompute also needs BASE=…"),
        (("precompute", "BASE=sd3", "CACHE=cache"), "precompute also needs SOURCE=…"),
        (("train", "BASE=sd3", "CACHE=cache"), "train also needs OUTPUT=…"),
        (("infer", "OUTPUT=out"), "infer also needs BASE=…"),
        (("score", "OUTPUT=out", "BASE=sd3"), "score also needs SOURCE=…"),
        (("serve", "BASE=sd3"), "serve also needs OUTPUT=…"),
    ],
)
def test_what_own_data_lacks_is_named(words: tuple[str, ...], missing: str) -> None:
    code, said, _ = make(*words)
    assert code == 2
    assert f"make {missing}, or CONFIG=" in said
    assert said.count("\n") == 1


OWN = ("SOURCE=my photos", "BASE=sd3", "CACHE=cache", "OUTPUT=out")


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        (
            "precompute",
            'precompute --source "my photos" --pretrained-model-name-or-path "sd3" --cache "cache"',
        ),
        (
            "train",
            'train --pretrained-model-name-or-path "sd3" --cache "cache" --output-dir "out"',
        ),
        (
            "infer",
            'infer generate --pretrained-model-name-or-path "sd3" --controlnet "out" '
            '--output-dir "out/images"',
        ),
        (
            "score",
            'infer score --source "my photos" --pretrained-model-name-or-path "sd3" '
            '--controlnet "out" --output-dir "out/score"',
        ),
        (
            "serve",
            'infer serve --pretrained-model-name-or-path "sd3" --controlnet "out" '
            '--output-dir "out/served"',
        ),
    ],
)
def test_own_data_gets_no_settings_of_the_demo(stage: str, command: str) -> None:
    line = make(stage, *OWN)[2].splitlines()[-1]
    assert " ".join(line.split()).endswith(f"python -m {command}")


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ((), "--config configs/demo.toml --memory 8"),
        (("BASE=sd3",), "--pretrained-model-name-or-path sd3 --memory 8"),
        (
            ("BASE=sd3", "CONFIG=own.toml"),
            "--config own.toml --pretrained-model-name-or-path sd3 --memory 8",
        ),
    ],
)
def test_fits_counts_the_demo_only_where_no_base_is_named(
    words: tuple[str, ...], options: str
) -> None:
    line = make("fits", "MEMORY=8", *words)[2].splitlines()[-1]
    assert line.split("-m benchmarks.memory.fits ")[1].replace('"', "").split() == options.split()


@pytest.mark.parametrize(
    "words",
    [
        ("fits", "train", "BASE=sd3", "CACHE=cache", "OUTPUT=out", "MEMORY=8"),
        ("demo", "FAST=1"),
        ("demo", "FAST=0", "CONFIG=configs/demo.toml"),
        ("train", "CARD=auto"),
        ("infer", "CARD=8gb"),
        ("score", "serve", "CARD=12gb"),
        ("precompute", "train", "CARD=12gb", "CONFIG=configs/sd35-medium.toml"),
    ],
)
def test_what_is_looked_at_is_taken(words: tuple[str, ...]) -> None:
    assert make(*words)[:2] == (0, "")
