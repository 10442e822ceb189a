"""Numbers of ControlNet blocks that diffusers and ComfyUI spread alike over a base."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import demo.base_model.pipeline
from sd3.controlnet.block_counts import counts_everywhere, describe_count
from tests.conftest import Outcome, flags
from train.config import TrainConfig
from train.memory.estimate import find_sizes, report
from train.memory.simulation import simulate


def in_diffusers(count: int, base: int) -> list[int]:
    """The residual of each block but the last, which gets none: its `interval_control`."""
    return [int(block / (base / count)) for block in range(base - 1)]


def in_comfyui(count: int, base: int) -> list[int]:
    """The same there: a run of `depth // blocks` each, one fewer of the last."""
    spread: list[int] = []
    for residual in range(count):
        spread += [residual] * (base // count - (residual == count - 1))
    return spread


def test_the_published_bases() -> None:
    assert counts_everywhere(24) == [1, 2, 3, 4, 6, 8, 12]
    assert counts_everywhere(38) == [1, 2, 19]


@pytest.mark.parametrize("base", range(2, 60))
def test_it_is_these_that_are_spread_alike(base: int) -> None:
    alike = [n for n in range(1, base // 2 + 1) if in_diffusers(n, base) == in_comfyui(n, base)]
    assert counts_everywhere(base) == alike


def test_what_is_said() -> None:
    assert describe_count(12, 24) is None
    assert describe_count(12, 38) == (
        "12 ControlNet blocks do not divide the base's 38, so ComfyUI spreads their residuals over "
        "it otherwise than diffusers; 1, 2 or 19 blocks are the same in both"
    )


def test_a_run_an_estimate_and_a_card_say_it(
    train_config: TrainConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    five = tmp_path / "base"
    pipeline = demo.base_model.pipeline.build_pipeline(0, num_layers=5)
    demo.base_model.pipeline.save_base(five, pipeline)
    config = replace(train_config, pretrained_model_name_or_path=str(five), max_train_steps=1)
    remark = describe_count(2, 5)
    assert remark is not None
    for count, said in ((2, True), (1, False)):
        one = replace(config, num_controlnet_layers=count, output_dir=tmp_path / str(count))
        outcome = command("train", *flags(one))
        assert outcome.exit_code == 0, outcome.output
        assert (f"train: {remark}\n" in outcome.output) is said
        card = (one.output_dir / "README.md").read_text()
        assert (f"{remark}.\n" in card) is said
        assert ("The base's 5 blocks are a multiple of its 1" in card) is not said
    sizes = find_sizes(config)
    assert report(config, sizes, simulate(config, sizes)).endswith(remark)
