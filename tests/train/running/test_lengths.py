"""How long a run is, what it says about it, and what it does once it is over."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from precompute.config import PrecomputeConfig
from precompute.run import precompute
from tests.conftest import Outcome, Spoil, flags, train_in_two_processes
from tests.train.test_run import WEIGHTS
from train.config import TrainConfig
from train.inputs import find_inputs, num_train_steps
from train.run import train
from train.saving import checkpoints


def train_until(config: TrainConfig, step: int) -> None:
    """Leave what a run leaves that is ended after a step."""
    train(replace(config, checkpointing_steps=1))
    for checkpoint in checkpoints.find(config.output_dir):
        if checkpoints.read_state(checkpoint).step > step:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    ("batch_before", "step", "batch_after", "steps"),
    [
        (2, 5, 4, 5 + 3),  # of 20 places 10 are left, in fours
        (4, 3, 2, 3 + 4),  # 8 are left, in twos
        (3, 7, 2, 7),  # the last batch reached beyond the end
        (2, 0, 3, 7),
    ],
)
def test_epochs_are_counted_by_samples(
    train_config: TrainConfig, batch_before: int, step: int, batch_after: int, steps: int
) -> None:
    config = replace(train_config, max_train_steps=None, num_train_epochs=2)
    inputs = find_inputs(config, 1)
    state = replace(inputs.state, step=step, place=step * batch_before)
    assert num_train_steps(config, replace(inputs, state=state), batch_after) == steps


def test_a_run_of_epochs_goes_on_with_another_batch_to_the_same_place(
    train_config: TrainConfig,
) -> None:
    # Two epochs of ten samples: five steps of two, then three of four, the last reaching beyond.
    config = replace(train_config, max_train_steps=None, num_train_epochs=2)
    train_until(config, 5)
    train(replace(config, train_batch_size=4, resume_from_checkpoint="latest"))
    state = checkpoints.read_state(checkpoints.find(config.output_dir)[-1])
    assert (state.step, state.place) == (8, 22)


@pytest.mark.slow
def test_a_run_of_epochs_goes_on_in_two_processes_and_back(
    train_config: TrainConfig,
) -> None:
    config = replace(train_config, max_train_steps=None, num_train_epochs=2)
    train_until(config, 5)
    resumed = replace(config, resume_from_checkpoint="latest")
    train_in_two_processes(resumed)
    state = checkpoints.read_state(checkpoints.find(config.output_dir)[-1])
    assert (state.step, state.place) == (8, 22)
    # And the other way round: three epochs in all, of which one process takes the last.
    train(replace(resumed, num_train_epochs=3))
    state = checkpoints.read_state(checkpoints.find(config.output_dir)[-1])
    assert (state.step, state.place) == (12, 30)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        # Cosine after one step of warm-up: (1 + cos(pi k / n)) / 2, of k = 3 steps after it.
        # n was 3, and is 5: (1 - cos(2 pi / 5)) / 2 = 0.3455.
        ({"max_train_steps": 6}, "was 0 and is 0.000345, because --max-train-steps was 4 and is 6"),
        # Without warm-up the fourth step is the whole half-wave of four.
        ({"max_train_steps": 8, "lr_scheduler": "constant"}, "was 0 and is 0.001, because"),
        ({"max_train_steps": 8, "lr_warmup_steps": 8}, "was 0 and is 0.0005, because"),
    ],
)
def test_a_rate_that_jumps_is_explained(
    train_config: TrainConfig,
    changes: dict[str, object],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(train_config)
    capsys.readouterr()
    train(replace(train_config, resume_from_checkpoint="latest", **changes))
    output = capsys.readouterr().out
    assert f"checkpoint-4: the learning rate {line}" in output
    for name in changes:
        assert f"--{name.replace('_', '-')} was" in output


def test_a_rate_that_goes_on_is_not_mentioned(
    train_config: TrainConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_until(train_config, 2)
    train(replace(train_config, resume_from_checkpoint="latest"))
    assert "the learning rate was" not in capsys.readouterr().out


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_finished_run_has_nothing_to_do(
    train_config: TrainConfig, command: Callable[..., Outcome], ema_decay: float | None
) -> None:
    config = replace(train_config, resume_from_checkpoint="latest", ema_decay=ema_decay)
    train(config)
    before = times(config.output_dir)
    for steps in (4, 3):
        outcome = command("train", *flags(replace(config, max_train_steps=steps)))
        assert outcome.exit_code == 0
        assert "nothing to do: the ControlNet is saved after 4 steps, " in outcome.output
        assert f"and the run ends at step {steps}; --max-train-steps" in outcome.output
        assert "ControlNet saved" not in outcome.output
        assert times(config.output_dir) == before


def test_a_run_whose_end_was_cut_is_finished(
    train_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps are in the checkpoint; the ControlNet is missing, or is an earlier run's."""
    config = replace(train_config, resume_from_checkpoint="latest")
    train(config)
    out = config.output_dir
    whole = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).unlink()
    train(config)
    assert (out / WEIGHTS).read_bytes() == whole
    (out / WEIGHTS).write_bytes((out / "checkpoint-2/controlnet" / WEIGHTS).read_bytes())
    train(config)
    assert (out / WEIGHTS).read_bytes() == whole
    (out / "README.md").unlink()
    train(config)
    assert (out / "README.md").is_file()
    assert "nothing to do" not in capsys.readouterr().out


def test_a_run_within_its_warm_up_says_so(
    train_config: TrainConfig, command: Callable[..., Outcome]
) -> None:
    config = replace(train_config, lr_warmup_steps=500)
    output = command("train", *flags(config)).output
    assert "--lr-warmup-steps 500 is more than the run's 4 steps" in output
    assert "saved after 4 steps, all in the warm-up of 500: it has hardly been trained" in output


@pytest.mark.parametrize("changes", [{"lr_warmup_steps": 4}, {"lr_scheduler": "constant"}])
def test_a_run_beyond_its_warm_up_says_nothing(
    train_config: TrainConfig, command: Callable[..., Outcome], changes: dict[str, object]
) -> None:
    config = replace(train_config, **({"lr_warmup_steps": 500} | changes))
    output = command("train", *flags(config)).output
    assert "--lr-warmup-steps" not in output
    assert "ControlNet saved after 4 steps\n" in output


@pytest.mark.slow
def test_stage_1_may_replace_the_validation_pairs_while_a_run_goes_on(
    train_config: TrainConfig,
    fresh: PrecomputeConfig,
    in_batch: Callable[[int, Spoil], None],
    tmp_path: Path,
) -> None:
    precompute(fresh)
    config = replace(
        train_config,
        cache=(str(fresh.cache),),
        validation_steps=4,
        num_validation_images=1,
        validation_inference_steps=1,
    )
    train(replace(config, output_dir=tmp_path / "undisturbed"))

    def replace_pairs(losses: object, _: object) -> object:
        prompts = ("another", "two")
        precompute(replace(fresh, validation_prompt=prompts))
        return losses

    in_batch(2, replace_pairs)
    train(config)
    for name in ("0.png", "1.png"):
        path = Path("validation/step-000004") / name
        ours = (config.output_dir / path).read_bytes()
        assert ours == (tmp_path / "undisturbed" / path).read_bytes()
    card = (config.output_dir / "README.md").read_text()
    assert fresh.validation_prompt[0] in card


@pytest.mark.parametrize("options", [[], ["--max-grad-norm", "0", "--fused-backward-pass"]])
def test_a_log_has_a_line_with_all_that_is_asked_for(
    train_config: TrainConfig, command: Callable[..., Outcome], options: list[str]
) -> None:
    output = command("train", *flags(replace(train_config, logging_steps=2)), *options).output
    (line,) = [line for line in output.splitlines() if line.startswith("train: 2 of 4 steps")]
    parts = [part.rpartition(" ")[0] for part in line.split(", ")]
    norm = [] if options else ["gradient norm"]
    assert parts[1:-2] == ["loss", *norm, "lr"]
    assert parts[-1] == line.rpartition(", ")[2].removesuffix(" left")
    assert line.split(", ")[-2].endswith(" samples/s")
