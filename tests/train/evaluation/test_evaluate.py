"""`--evaluate` measures what the run's validation measured, and touches nothing of the run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.conftest import four_steps
from train.config import TrainConfig
from train.run import train


@pytest.fixture(scope="module")
def done(base: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run with checkpoints at steps 2 and 4, averaged weights and validations."""
    config = replace(
        four_steps(base, held_out, tmp_path_factory.mktemp("evaluated") / "out"),
        learning_rate=1e-2,
        validation_steps=2,
        num_validation_images=1,
        validation_inference_steps=1,
        ema_decay=0.5,
    )
    train(config)
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def validated(config: TrainConfig, step: int) -> Path:
    return config.output_dir / "validation" / f"step-{step:06d}"


@pytest.mark.parametrize(
    ("name", "step", "title"),
    [("checkpoint-2", 2, "checkpoint-2"), (".", 4, "out")],
)
def test_it_gives_the_figures_and_pictures_of_the_validation(
    done: TrainConfig,
    tmp_path: Path,
    name: str,
    step: int,
    title: str,
) -> None:
    before = contents(done.output_dir)
    resumes = replace(done, resume_from_checkpoint="latest", keep_best=True)  # as configs/ say
    train(replace(resumes, evaluate=str(done.output_dir / name), output_dir=tmp_path / "seen"))
    assert contents(done.output_dir) == before
    found = contents(tmp_path / "seen" / "evaluation" / title)
    result = json.loads(found.pop("evaluation.json"))
    drawn = contents(validated(done, step))
    measured = json.loads(drawn.pop("held_out.json"))
    at_start = json.loads((validated(done, 0) / "held_out.json").read_text())
    # To the bit.
    assert result["levels"] == {**measured, "base_held_out_loss": at_start["held_out_loss"]}
    assert found == drawn
    for key, levels in result["levels"].items():
        assert result["means"][key] == pytest.approx(sum(levels) / 8, rel=1e-12)
    assert result["num_rows"] == 3


def test_a_checkpoint_may_be_named_as_in_the_output_folder(
    done: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(done, evaluate="checkpoint-4", validation_steps=0))
    folder = done.output_dir / "evaluation"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    levels = json.loads((folder / "checkpoint-4/evaluation.json").read_text())["levels"]
    shown = capsys.readouterr().out
    for each in levels.values():
        for figure in (sum(each) / 8, *each):
            assert f"{figure:.4f}" in shown
    shutil.rmtree(folder)


def test_what_cannot_be_evaluated_is_refused(
    done: TrainConfig, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no such checkpoint; .* holds checkpoint-2, checkpoint"):
        train(replace(done, evaluate="checkpoint-3"))
    with pytest.raises(ConfigError, match=r"no held-out rows .* --validation-rows"):
        train(replace(done, evaluate="checkpoint-4", cache=(str(cache),)))
    damaged = shutil.copytree(done.output_dir / "checkpoint-4", tmp_path / "checkpoint-4")
    weights = damaged / "controlnet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="damaged"):
        train(replace(done, evaluate=str(damaged)))
    with pytest.raises(ConfigError, match="leave one out"):
        replace(done, evaluate="checkpoint-4", estimate=True)
    assert not (done.output_dir / "evaluation").exists()
