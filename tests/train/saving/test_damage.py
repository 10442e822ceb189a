"""Damaged checkpoints: `latest` names them and takes the one before; by name they are refused."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from common.errors import ConfigError
from tests.conftest import Outcome, flags
from tests.train.test_run import WEIGHTS, same
from train.config import TrainConfig
from train.run import train
from train.saving import checkpoints, resuming

Damage = Callable[[Path], None]


def empty(path: Path) -> None:
    os.truncate(path, 0)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garble(path: Path) -> None:
    """Change 16 bytes in the middle, which is in the numbers of every file with tensors."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(byte ^ 0x5A for byte in data[middle : middle + 16])
    path.write_bytes(data)


def break_state(path: Path) -> None:
    path.write_text('{"step": 4, "pla')


DAMAGED: list[tuple[str, Damage, str]] = [
    ("optimizer.bin", empty, "is empty"),
    ("scheduler.bin", empty, "is empty"),
    ("optimizer.bin", cut, r"holds \d+ bytes, \d+ were written"),
    ("scheduler.bin", cut, r"holds \d+ bytes, \d+ were written"),
    ("optimizer.bin", garble, "does not hold the bytes that were written"),
    (f"controlnet/{WEIGHTS}", garble, "does not hold the bytes that were written"),
    (f"controlnet/{WEIGHTS}", cut, r"holds \d+ bytes, \d+ were written"),
    (f"controlnet_ema/{WEIGHTS}", garble, "does not hold the bytes that were written"),
    ("controlnet/config.json", empty, "is empty"),
    ("random_states_0.pkl", os.unlink, "is missing"),
    ("train_state.json", break_state, "damaged"),
    ("train_state.json", empty, "damaged"),
    ("train_state.json", os.unlink, "is missing"),
]
# What a checkpoint shows of its damage without the digests, which older ones lack.
VISIBLE = [
    ("optimizer.bin", empty, "is empty"),
    ("scheduler.bin", cut, "is cut short"),
    (f"controlnet/{WEIGHTS}", cut, "is cut short"),
]


def digests(checkpoint: Path) -> None:
    """Remove the digests of a checkpoint's files, as if it was written before there were any."""
    edit_state(checkpoint, "files")


def edit_state(checkpoint: Path, *removed: str, **entries: Any) -> None:
    """Change a checkpoint's state, and write it without a digest, as earlier versions did."""
    path = checkpoint / "train_state.json"
    state = json.loads(path.read_text()) | entries
    for name in ("digest", *removed):
        state.pop(name, None)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def finished(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of four steps, with checkpoints after two and four."""
    AcceleratorState._reset_state(True)  # a test before may have settled the precision
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        cache=(str(cache),),
        output_dir=tmp_path_factory.mktemp("finished") / "out",
        num_controlnet_layers=1,
        train_batch_size=1,
        max_train_steps=4,
        learning_rate=1e-3,
        checkpointing_steps=2,
        ema_decay=0.9,
        validation_steps=0,
        report_to="none",
        mixed_precision="no",
    )
    train(config)
    return config


@pytest.fixture
def config(finished: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The run's settings to resume a copy of it."""
    shutil.copytree(finished.output_dir, tmp_path / "out")
    return replace(finished, output_dir=tmp_path / "out", resume_from_checkpoint="latest")


@pytest.mark.parametrize(("name", "damage", "found"), DAMAGED)
def test_latest_names_a_damaged_checkpoint_and_takes_the_one_before(
    finished: TrainConfig,
    config: TrainConfig,
    command: Callable[..., Outcome],
    name: str,
    damage: Damage,
    found: str,
) -> None:
    newest = config.output_dir / "checkpoint-4"
    damage(newest / name)
    (config.output_dir / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=rf"^{newest / name}: {found}.*; resume from ") as caught:
        train(replace(config, resume_from_checkpoint="checkpoint-4"))
    assert len(str(caught.value).splitlines()) == 1
    outcome = command("train", *flags(config))
    assert outcome.exit_code == 0, outcome.output
    assert f"{newest / name}: " in outcome.output
    assert f"resuming {config.output_dir / 'checkpoint-2'}" in outcome.output
    assert same(finished.output_dir, config.output_dir)
    assert same(finished.output_dir / "controlnet_ema", config.output_dir / "controlnet_ema")


def test_an_earlier_checkpoint_is_resumed_by_name_where_the_later_one_is_damaged(
    finished: TrainConfig, config: TrainConfig
) -> None:
    break_state(config.output_dir / "checkpoint-4" / "train_state.json")
    (config.output_dir / WEIGHTS).unlink()
    train(replace(config, resume_from_checkpoint="checkpoint-2"))
    assert same(finished.output_dir, config.output_dir)


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_passed_over(
    finished: TrainConfig, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = config.output_dir / "checkpoint-4" / "optimizer.bin"
    opened = Path.open

    def answers(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *arguments, **options)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "open", answers)
        expected = rf"^{stale.parent}: cannot be read \({stale}: Stale file handle\)"
        with pytest.raises(ConfigError, match=expected):
            train(config)
        (config.output_dir / WEIGHTS).unlink()
        train(replace(config, resume_from_checkpoint="checkpoint-2"))
    assert same(finished.output_dir, config.output_dir)


def test_no_checkpoint_that_is_whole_is_an_error(config: TrainConfig) -> None:
    for step in (2, 4):
        empty(config.output_dir / f"checkpoint-{step}" / "optimizer.bin")
    with pytest.raises(ConfigError, match=r"checkpoint-4/optimizer\.bin: is empty.*none.*whole"):
        train(config)


@pytest.mark.parametrize(("name", "damage", "found"), VISIBLE)
def test_checkpoints_without_digests_are_resumed_unless_their_damage_shows(
    finished: TrainConfig,
    config: TrainConfig,
    command: Callable[..., Outcome],
    name: str,
    damage: Damage,
    found: str,
) -> None:
    for step in (2, 4):
        digests(config.output_dir / f"checkpoint-{step}")
    damage(config.output_dir / "checkpoint-4" / name)
    (config.output_dir / WEIGHTS).unlink()
    outcome = command("train", *flags(config))
    assert outcome.exit_code == 0, outcome.output
    assert f"checkpoint-4/{name}: {found}" in outcome.output
    assert same(finished.output_dir, config.output_dir)


def test_a_checkpoint_without_digests_that_cannot_be_loaded_is_one_line(
    config: TrainConfig,
) -> None:
    newest = config.output_dir / "checkpoint-4"
    digests(newest)
    path = newest / "optimizer.bin"
    data = path.read_bytes()
    where = data.index(b"exp_avg")  # in the pickle that says what the tensors are
    path.write_bytes(data[: where - 4] + bytes(16) + data[where + 12 :])
    with pytest.raises(
        ConfigError, match=rf"^{newest}: cannot be loaded \(.*\)\. Move it away"
    ) as one:
        train(config)
    assert len(str(one.value).splitlines()) == 1


@pytest.mark.parametrize("folder", ["controlnet", "controlnet_ema"])
def test_a_checkpoint_whose_weights_are_not_finite_is_passed_over(
    finished: TrainConfig, config: TrainConfig, command: Callable[..., Outcome], folder: str
) -> None:
    newest = config.output_dir / "checkpoint-4"
    path = newest / folder / WEIGHTS
    tensors = load_file(path)
    name = "pos_embed_input.proj.bias"
    tensors[name][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    digests(newest)
    (config.output_dir / WEIGHTS).unlink()
    outcome = command("train", *flags(replace(config, on_nonfinite="skip")))
    assert outcome.exit_code == 0, outcome.output
    assert f"{path}: the weight {name} is not finite" in outcome.output
    assert same(finished.output_dir, config.output_dir)


def test_the_checkpoint_just_written_stays_whatever_the_others_are_called(
    config: TrainConfig,
) -> None:
    out = config.output_dir
    shutil.rmtree(out / "checkpoint-4")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-900")
    train(replace(config, checkpoints_total_limit=1, max_train_steps=3))
    assert [path.name for path in checkpoints.find(out)] == ["checkpoint-3"]


def test_damaged_later_checkpoints_go_before_whole_earlier_ones(config: TrainConfig) -> None:
    out = config.output_dir
    shutil.rmtree(out / "checkpoint-4")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-900")
    edit_state(out / "checkpoint-900", step=900)
    empty(out / "checkpoint-900" / "optimizer.bin")
    train(replace(config, checkpoints_total_limit=2, max_train_steps=3))
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_one_whole_later_checkpoint_is_enough_to_refuse_an_earlier_one(config: TrainConfig) -> None:
    out = config.output_dir
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-6")
    edit_state(out / "checkpoint-6", step=6)
    empty(out / "checkpoint-6" / "optimizer.bin")
    with pytest.raises(ConfigError, match=r"checkpoint-2: .* holds later ones, checkpoint-4, "):
        resuming.choose(out, "checkpoint-2")


def test_a_flipped_bit_in_any_byte_of_the_state_is_noticed(config: TrainConfig) -> None:
    checkpoint = config.output_dir / "checkpoint-4"
    path = checkpoint / "train_state.json"
    data = path.read_bytes()
    assert checkpoints.parse_state(checkpoint).step == 4
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        problem = resuming.find_damage(checkpoint)
        assert problem is not None
        assert problem.startswith(f"{path}: damaged (")


@pytest.mark.parametrize(
    "wrong",
    [{"step": "4"}, {"step": 4.5}, {"place": None}, {"fingerprints": []}, {"averaged_step": 4}],
)
def test_a_state_of_earlier_versions_is_read_strictly(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any]
) -> None:
    out = config.output_dir
    for step in (2, 4):
        digests(out / f"checkpoint-{step}")
    assert resuming.choose(out, "latest") == out / "checkpoint-4"
    edit_state(out / "checkpoint-4", **wrong)
    capsys.readouterr()
    assert resuming.choose(out, "latest") == out / "checkpoint-2"
    assert capsys.readouterr().out.startswith(f"train: {out}/checkpoint-4/train_state.json: damag")


def test_a_run_does_not_begin_among_checkpoints_without_a_state(config: TrainConfig) -> None:
    for step in (2, 4):
        (config.output_dir / f"checkpoint-{step}" / "train_state.json").unlink()
    with pytest.raises(ConfigError, match=r"holds checkpoint-4 of an earlier run"):
        train(replace(config, resume_from_checkpoint=None))
    with pytest.raises(ConfigError, match=r"checkpoint-4/train_state\.json: is missing; and none"):
        train(config)


def test_a_memory_that_is_full_is_not_a_damaged_checkpoint(tmp_path: Path) -> None:
    class Full:
        def load_state(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory$"):
        resuming.restore(cast(Accelerator, Full()), tmp_path)
