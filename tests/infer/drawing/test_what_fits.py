"""What does not go together is said in one line, before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError
from infer.config import GenerateConfig, PipelineConfig, ScoreConfig, ServeConfig
from infer.drawing import metadata
from infer.drawing.controlnet_set import find_controlnet_sets
from infer.loaded_base import LoadedBase
from precompute.config import PrecomputeConfig
from precompute.fingerprints.encoder_spec import read_specs
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, Outcome, flags

# The miniature has positions for 32 x 32 patches of 2 x 2 latents of 8 x 8 pixels.
LARGEST_PX = 32 * 2 * 8
COMMANDS = (
    "generate",
    "score",
    pytest.param("serve", marks=pytest.mark.extras),
)


@pytest.fixture
def configs(
    base: Path, controlnet: Path, circles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, PipelineConfig]:
    """Each command's settings; the models cannot be loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(LoadedBase, "__init__", load)
    common = {
        "pretrained_model_name_or_path": str(base),
        "controlnet": (str(controlnet),),
        "output_dir": tmp_path / "out",
        "device": "cpu",
    }
    return {
        "generate": GenerateConfig(**common, prompt=PROMPTS[:1], image=(circles / "source/0.png",)),
        "score": ScoreConfig(**common, source=circles, num_samples=1),
        "serve": ServeConfig(**common),
    }


def changed(controlnet: Path, to: Path, **entries: object) -> Path:
    """Return a copy of a ControlNet with other entries in its configuration."""
    shutil.copytree(controlnet, to)
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(values | entries))
    return to


@pytest.mark.parametrize("name", COMMANDS)
def test_a_controlnet_that_takes_more_than_a_mask_is_refused(
    name: str,
    configs: dict[str, PipelineConfig],
    controlnet: Path,
    command: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    other = changed(controlnet, tmp_path / "more", extra_conditioning_channels=2)
    config = replace(configs[name], controlnet=(str(other),))
    outcome = command("infer", name, *flags(config))
    assert outcome.exit_code == 2
    assert f"Error: --controlnet {other} " in outcome.output
    assert "takes 18 channels; a conditioning image has 16" in outcome.output
    assert not config.output_dir.exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_size_without_positions_is_refused(
    name: str, configs: dict[str, PipelineConfig], command: Callable[..., Outcome]
) -> None:
    config = replace(configs[name], resolution=1024)
    outcome = command("infer", name, *flags(config))
    assert outcome.exit_code == 2
    lines = [line for line in outcome.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert f"1024 x 1024 px: the base has positions for {LARGEST_PX} px a side" in lines[0]
    assert not config.output_dir.exists()


def test_the_largest_size_is_taken(
    configs: dict[str, PipelineConfig], controlnet: Path, tmp_path: Path
) -> None:
    config = replace(configs["generate"], height=LARGEST_PX, width=RESOLUTION_PX)
    _, (found,) = find_controlnet_sets(config, with_text_encoders=True)
    assert found.convention.sizes == ((RESOLUTION_PX, LARGEST_PX),)
    with pytest.raises(ConfigError, match=f"64 x {LARGEST_PX + 16} px: the base has positions"):
        find_controlnet_sets(replace(config, height=LARGEST_PX + 16), with_text_encoders=True)
    # A ControlNet has positions of its own, or none.
    fewer = changed(controlnet, tmp_path / "fewer", pos_embed_max_size=4)
    with pytest.raises(ConfigError, match="the ControlNet has positions for 64 px a side"):
        find_controlnet_sets(replace(config, controlnet=(str(fewer),)), with_text_encoders=True)
    none = changed(controlnet, tmp_path / "none", pos_embed_max_size=4, use_pos_embed=False)
    find_controlnet_sets(replace(config, controlnet=(str(none),)), with_text_encoders=True)


def test_precompute_refuses_a_size_without_positions(
    precompute_config: PrecomputeConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    config = replace(precompute_config, cache=tmp_path / "cache", resolution=1024)
    outcome = command("precompute", *flags(config))
    assert outcome.exit_code == 2
    assert f"--resolution 1024: the base has positions for {LARGEST_PX} px" in outcome.output
    read_specs(Path(config.pretrained_model_name_or_path), replace(config, resolution=LARGEST_PX))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, ""),
        ({"resolution": RESOLUTION_PX, "max_sequence_length": TOKENS}, ""),
        ({"resolution": 128}, "trained on pictures of 64 x 64 px, and these have 128 x 128 px"),
        ({"max_sequence_length": 77}, f"trained with {TOKENS} T5 tokens, and these have 77"),
        (
            {"height": 128, "width": 64, "max_sequence_length": 77},
            "trained on pictures of 64 x 64 px, and these have 64 x 128 px; "
            f"trained with {TOKENS} T5 tokens, and these have 77",
        ),
    ],
)
def test_what_differs_from_training_is_said(
    changes: dict[str, int],
    note: str,
    configs: dict[str, PipelineConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(configs["generate"], **changes)
    find_controlnet_sets(config, with_text_encoders=True)
    said = capsys.readouterr().err
    assert said == (f"{config.controlnet[0]}: {note}.\n" if note else "")


def test_what_differs_from_buckets_is_said(
    configs: dict[str, PipelineConfig],
    controlnet: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {"buckets": [[64, 64], [48, 80]], "max_sequence_length": TOKENS}
    other = changed(controlnet, tmp_path / "buckets", _precompute=data)
    config = replace(configs["generate"], controlnet=(str(other),))
    find_controlnet_sets(replace(config, height=48, width=80), with_text_encoders=True)
    assert capsys.readouterr().err == ""
    find_controlnet_sets(replace(config, resolution=80), with_text_encoders=True)
    expected = "trained on pictures of 2 sizes, 64 x 64 to 80 x 48 px, and these have 80 x 80 px"
    assert expected in capsys.readouterr().err


def test_a_checkpoint_stands_for_the_controlnet_in_it(
    configs: dict[str, PipelineConfig],
    controlnet: Path,
    command: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for step in (50, 1000):
        shutil.copytree(controlnet, run / f"checkpoint-{step}/controlnet")
    names = (str(run / "checkpoint-50"), str(run / "checkpoint-1000/controlnet"))
    config = replace(configs["generate"], controlnet=names)
    _, sets = find_controlnet_sets(config, with_text_encoders=True)
    assert [one.folders[0] for one in sets] == [
        run / "checkpoint-50/controlnet",
        run / "checkpoint-1000/controlnet",
    ]
    assert [one.title for one in sets] == ["checkpoint-50", "checkpoint-1000"]
    assert metadata.digest_of(run / "checkpoint-50") == sets[0].digests[0]  # as --like asks
    # A run that has not finished holds checkpoints alone; the newest is named.
    outcome = command("infer", "generate", *flags(replace(config, controlnet=(str(run),))))
    assert outcome.exit_code == 2
    assert (
        f"no ControlNet in it. Did you mean {run / 'checkpoint-1000'}? So far it" in outcome.output
    )
