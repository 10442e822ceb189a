"""Every command in the README and in docs/ runs, small, in a folder that has what the pages name.

A command with a comment that begins with one of `MARKS` is not run: it needs the hub or another
machine. Its options are checked all the same.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import SD3ControlNetModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file

from precompute.config import PrecomputeConfig
from tests.conftest import (
    REPOSITORY,
    RESOLUTION_PX,
    TOKENS,
    main_of,
    run_python,
    with_another_control,
    without_make,
)
from tests.published_names import one_file, transformer
from train import models
from train.config import TrainConfig
from train.run import train

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (
        REPOSITORY / "README.md",
        REPOSITORY / "CONTRIBUTING.md",
        *(REPOSITORY / "docs").glob("*.md"),
    )
)
PROGRAMS = ("python", "make", "accelerate", "hf", "unzip", "cp", "rsync", "tensorboard")
MARKS = ("needs ", "the reference")
# make's targets that other tests run, or that this test's own environment stands for.
NOT_HERE = {
    f"make {name}" for name in ("demo", "demo-full", "setup", "test", "check", "mutate", "gpu")
}
# What the pages say at true size.
SMALLER_NEXT = {"--validation-steps": "2", "--resolution": str(RESOLUTION_PX)}
SMALLER = {
    "--resolution=1024": f"--resolution={RESOLUTION_PX}",
    "--cache=cache": "--cache=a-new-one",  # the one that is there was made at other settings
    "--max_train_steps=15000": "--max_train_steps=2",
    "--validation_steps=100": "--validation_steps=2",
}
SETTINGS = f"""
[precompute]
pretrained_model_name_or_path = "BASE"
resolution = {RESOLUTION_PX}
max_sequence_length = {TOKENS}
text_dtype = "float32"
cache_dtype = "float32"
device = "cpu"
overwrite = true  # of the caches that are there for the tests, and of no reader

[train]
pretrained_model_name_or_path = "BASE"
num_controlnet_layers = 2
mixed_precision = "no"
max_train_steps = 2
checkpointing_steps = 2
validation_steps = 2
num_validation_images = 1
validation_inference_steps = 2
report_to = "none"
resume_from_checkpoint = "latest"

[infer]
pretrained_model_name_or_path = "BASE"
num_inference_steps = 2
device = "cpu"

[score]
pretrained_model_name_or_path = "BASE"
num_inference_steps = 2
num_samples = 2
device = "cpu"

[decode]
pretrained_model_name_or_path = "BASE"
device = "cpu"
"""


@dataclass(frozen=True)
class Line:
    """A command of a page, and whether the page marks it as one that cannot run everywhere."""

    text: str
    is_marked: bool


def commands(page: str) -> list[Line]:
    """Return the commands of a page's indented blocks, continued lines joined."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE):
        is_script = block.strip().startswith("#!")  # of a cluster
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command, _, comment = line.strip().removeprefix("exec ").partition("  #")
            if command.split(" ")[0] in PROGRAMS:
                is_marked = is_script or comment.strip().startswith(MARKS)
                found.append(Line(command.strip(), is_marked))
    return found


def parser(module: str, arguments: list[str]) -> tuple[click.Command, list[str]]:
    """Return the click command of `python -m <module> <arguments>`, and what is left for it."""
    command = main_of(module)
    if isinstance(command, click.Group):
        return command.commands[arguments[0]], arguments[1:]
    return command, arguments


def python_arguments(words: list[str]) -> list[str]:
    """Return what follows `-m` in `python -m …` or `accelerate launch … -m …`, or nothing."""
    return words[words.index("-m") + 1 :] if "-m" in words else []


def made_by_make(command: str) -> list[str]:
    """Return the `python -m` command that a `make` command runs, as words."""
    shown = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        check=True,
        env=without_make(),
    ).stdout
    (line,) = [line for line in shown.splitlines() if "python -m" in line]
    return shlex.split(line.partition("&& ")[2])


def mark_as_installed(folder: Path) -> None:
    """Have `make` in a folder find all packages installed."""
    for name in (".installed", ".installed-dev"):
        (folder / ".venv" / name).touch()


@pytest.fixture(scope="session")
def prepared(
    base: Path,
    circles: Path,
    precompute_config: PrecomputeConfig,
    held_out: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with everything that the pages name, as their reader would have it."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    (folder / ".venv/bin").mkdir(parents=True)
    mark_as_installed(folder)
    shutil.copytree(base, folder / "BASE")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for path in (folder / "configs").rglob("*.toml"):
        path.write_text(SETTINGS if path.name == "sd35-medium.toml" else "[train]\n")
    (folder / "my.toml").write_text("[train]\nlearning_rate = 2e-5\n")
    rows = [json.loads(line) for line in (circles / "prompt.json").read_text().splitlines()]
    pictures(folder / "my-pictures", circles, rows)
    tars(folder / "tars", circles, rows)
    for name in ("fill50k", "unseen"):
        shutil.copytree(circles, folder / name)
    (folder / "training").mkdir()
    with zipfile.ZipFile(folder / "fill50k.zip", "w") as archive:
        for path in sorted(circles.rglob("*")):
            archive.write(path, Path("fill50k") / path.relative_to(circles))
    shutil.copy(folder / "fill50k.zip", folder / "training")
    images = ("edges.png", "outline.png", "conditioning_image_1.png", "conditioning_image_2.png")
    for name in images:
        shutil.copy(circles / "source/0.png", folder / name)
    shutil.copy(circles / "target/0.png", folder / "picture.png")
    Image.new("L", (512, 512), 255).save(folder / "mask.png")
    bases(folder)
    (folder / "pairs.jsonl").write_text('{"prompt": "a caption", "image": "edges.png"}\n')
    return folder


@pytest.fixture(scope="session")
def with_runs(
    prepared: Path, held_out: Path, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same after a run: cache, out, watched, and a picture."""
    folder = tmp_path_factory.mktemp("after") / "reader"
    shutil.copytree(prepared, folder)
    shutil.copytree(held_out, folder / "cache")
    with_another_control(held_out, folder / "canny-cache", "fine")
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        cache=(str(held_out),),
        output_dir=folder / "out",
        num_controlnet_layers=2,
        max_train_steps=1,
        validation_steps=0,
        mixed_precision="no",
        report_to="none",
    )
    AcceleratorState._reset_state(True)
    train(config)
    shutil.copytree(folder / "out", folder / "watched")
    models.new_controlnet(base, None, 2, "zeros", 1).save_pretrained(folder / "inpainting")
    # ComfyUI knows SD3's heads alone, which are wider than the miniature's.
    heads = {"num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": 128}
    SD3ControlNetModel(num_layers=1, **heads).save_pretrained(folder / "out-zeros")
    return folder


def bases(folder: Path) -> None:
    """Write the base's one-file checkpoint, another transformer, and a LoRA of kohya's names."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder / "BASE")
    whole = one_file(pipeline, text=False)
    save_file(whole, folder / "sd3.5_medium.safetensors")
    tuned = transformer(pipeline.transformer.state_dict())
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tuned.items()},
        folder / "tuned.safetensors",
    )
    width = tuned["joint_blocks.0.x_block.attn.proj.bias"].shape[0]
    module = "lora_unet_joint_blocks_0_x_block_attn_proj"
    lora = {"down": torch.ones(1, width), "up": torch.ones(width, 1)}
    save_file(
        {f"{module}.lora_{name}.weight": tensor for name, tensor in lora.items()},
        folder / "style.safetensors",
    )


def pictures(folder: Path, circles: Path, rows: list[dict[str, str]]) -> None:
    """Write an image folder with conditioning images and metadata.jsonl."""
    (folder / "edges").mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows, 1):
        shutil.copy(circles / row["target"], folder / f"{number}.png")
        shutil.copy(circles / row["source"], folder / f"edges/{number}.png")
        lines.append(
            {
                "file_name": f"{number}.png",
                "conditioning_image_file_name": f"edges/{number}.png",
                "text": row["prompt"],
            }
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def tars(folder: Path, circles: Path, rows: list[dict[str, str]]) -> None:
    """Write a WebDataset tar with jpg, depth.png and txt."""
    from PIL import Image

    folder.mkdir()
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for number, row in enumerate(rows):
            Image.open(circles / row["target"]).convert("RGB").save(folder / "image.jpg")
            (folder / "caption.txt").write_text(row["prompt"])
            tar.add(folder / "image.jpg", f"{number:04d}.jpg")
            tar.add(circles / row["source"], f"{number:04d}.depth.png")
            tar.add(folder / "caption.txt", f"{number:04d}.txt")
    (folder / "image.jpg").unlink()
    (folder / "caption.txt").unlink()


@pytest.fixture
def reader(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder for a page, as the current folder."""
    page = request.node.callspec.params["page"]
    # The README begins with nothing made; the pages go on from there.
    name = "prepared" if page == "README.md" else "with_runs"
    folder = tmp_path / "reader"
    shutil.copytree(request.getfixturevalue(name), folder)
    mark_as_installed(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODEL_DIR", "BASE")
    monkeypatch.setenv("OUTPUT_DIR", "out-of-the-script")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, reader: Path, command: Callable[..., Any]) -> None:
    for line in commands(page):
        words = shlex.split(os.path.expandvars(line.text), comments=True)
        if words[0] == "make":
            if " ".join(words[:2]) in NOT_HERE:
                continue
            words = [] if line.is_marked else made_by_make(os.path.expandvars(line.text))
        arguments = python_arguments(words)
        if line.is_marked or not words:
            continue
        if arguments and not arguments[0].startswith("benchmarks"):
            arguments = smaller(arguments)
            AcceleratorState._reset_state(True)
            done = command(*arguments)
            assert done.exit_code == 0, f"{line.text}\n{done.output}"
        else:
            if words[0] == "python":
                words[0] = sys.executable
            # The benchmarks are no part of what is installed: they are run in a clone.
            environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
            subprocess.run(
                " ".join(map(redirection, words)), shell=True, check=True, env=environment
            )


def smaller(arguments: list[str]) -> list[str]:
    """Return arguments with the values that the miniature needs."""
    before = ["", *arguments]
    return [
        SMALLER_NEXT.get(flag, SMALLER.get(argument, argument))
        for flag, argument in zip(before, arguments, strict=False)
    ]


def redirection(word: str) -> str:
    """Return a word as the shell is to read it: `>` as itself, all else as it stands."""
    return word if word == ">" else shlex.quote(word)


@pytest.mark.parametrize("page", PAGES)
def test_the_options_of_a_page_exist(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "my.toml").write_text("[train]\nlearning_rate = 2e-5\n")
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        arguments = python_arguments(shlex.split(line.text, comments=True))
        if not arguments or "--like" in arguments or arguments[0].startswith("benchmarks"):
            continue
        command, rest = parser(arguments[0], arguments[1:])
        try:
            command.make_context("command", rest)
        except click.ClickException as error:
            pytest.fail(f"{page}: {line.text}\n{error.format_message()}")


@pytest.mark.slow
def test_commands_within_sentences_exist() -> None:
    for page in [*PAGES, "CHANGELOG.md"]:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for spoken in re.findall(r"`(python -m [^`]+)`", text):
            module, *words = spoken.split()[2:]
            path = REPOSITORY / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), spoken
            flags = [word for word in words if word.startswith("--")]
            if flags:
                assert all(flag in help_of(module) for flag in flags), f"{page}: {spoken}"


@cache
def help_of(module: str) -> str:
    return run_python("-m", module, "--help").stdout


def test_pages_have_commands() -> None:
    counts = {page: len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 10
    assert counts["docs/data.md"] >= 8
    assert counts["docs/from-train-controlnet-sd3.md"] == 3


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert ((REPOSITORY / page).parent / target).exists(), f"{page}: {target}"


def test_the_readme_is_a_page() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 140
