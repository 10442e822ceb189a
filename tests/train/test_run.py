"""Stage 2: exact resumption, checkpoints that are whole, and clear refusals."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3ControlNetModel
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import ConfigError, ShardError
from common.options import as_dict
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.controlnet.pooled_projection import DEFAULT_POOLED_PROJECTION, pooled_projection_of
from tests.conftest import Outcome, flags, run_python, running, train_in_two_processes
from train import models
from train.config import TrainConfig
from train.memory.cast_weights import CastLinear
from train.misplaced_options import MISPLACED
from train.run import train
from train.saving import checkpoints, resuming

WEIGHTS = "diffusion_pytorch_model.safetensors"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def assert_close(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            theirs[name],
            tensor,
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def near_gradient_descent(config: TrainConfig) -> TrainConfig:
    """AdamW with an epsilon that drowns the second moment, which else makes a step of rounding.

    Without clipping, which would hide gradients that are too large as a whole.
    """
    return replace(
        config, adam_epsilon=1.0, learning_rate=0.1, adam_weight_decay=0.0, max_grad_norm=0.0
    )


def same(one: Path, other: Path) -> bool:
    return (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_training_changes_the_controlnet_and_stock_diffusers_loads_it(
    train_config: TrainConfig, base: Path
) -> None:
    train(train_config)
    loaded = SD3ControlNetModel.from_pretrained(train_config.output_dir)
    fresh = models.new_controlnet(base, None, 2)
    moved = [
        name
        for name, tensor in loaded.state_dict().items()
        if not torch.equal(tensor, fresh.state_dict()[name])
    ]
    # Weight decay alone would not move the blocks that start at zero.
    assert any(name.startswith("controlnet_blocks.") for name in moved)
    assert pooled_projection_of(loaded.config) == DEFAULT_POOLED_PROJECTION
    run = json.loads((train_config.output_dir / "run.json").read_text())
    assert run["stage"] == "train"
    assert run["config"] == as_dict(train_config)
    assert run["data"]["max_sequence_length"] == 20


def test_a_run_is_reproducible(train_config: TrainConfig, tmp_path: Path) -> None:
    other = replace(train_config, output_dir=tmp_path / "other", dataloader_num_workers=1)
    train(train_config)
    train(other)
    assert same(train_config.output_dir, other.output_dir)
    train(replace(train_config, output_dir=tmp_path / "seeded", seed=1))
    assert not same(train_config.output_dir, tmp_path / "seeded")


def test_resuming_ends_where_the_undisturbed_run_does(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(train_config, gradient_accumulation_steps=2)
    train(config)
    resumed = replace(config, output_dir=tmp_path / "resumed", resume_from_checkpoint="latest")
    shutil.copytree(config.output_dir, resumed.output_dir)
    shutil.rmtree(resumed.output_dir / "checkpoint-4")
    (resumed.output_dir / WEIGHTS).unlink()
    train(resumed)
    assert same(config.output_dir, resumed.output_dir)
    state = checkpoints.read_state(resumed.output_dir / "checkpoint-4")
    assert (state.step, state.place) == (4, 4 * 2 * 2)


def test_resuming_with_another_accumulation_keeps_whole_steps(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    config = near_gradient_descent(replace(train_config, lr_scheduler="constant"))
    train(config)
    first = replace(config, train_batch_size=1, gradient_accumulation_steps=2, max_train_steps=2)
    other = tmp_path / "other"
    train(replace(first, output_dir=other))
    # Two steps of 1 x 2, then two of 2 x 1: the same samples in the same steps throughout.
    train(replace(config, output_dir=other, resume_from_checkpoint="latest"))
    assert_close(config.output_dir, other)
    # And one batch of three steps' worth moves the place by as much.
    more = replace(first, gradient_accumulation_steps=3, max_train_steps=6)
    train(replace(more, output_dir=other, resume_from_checkpoint="latest"))
    state = checkpoints.read_state(other / "checkpoint-6")
    assert (state.step, state.place) == (6, 8 + 2 * 3)


def test_a_new_learning_rate_is_followed_on_resuming(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(train_config, adam_weight_decay=0.0, lr_scheduler="constant")
    train(replace(config, max_train_steps=2))
    stopped = (config.output_dir / WEIGHTS).read_bytes()
    train(replace(config, learning_rate=0.0, resume_from_checkpoint="latest"))
    assert (config.output_dir / WEIGHTS).read_bytes() == stopped


@pytest.mark.parametrize("max_norm", [0.0, 0.01])
def test_accumulation_equals_one_larger_batch(
    train_config: TrainConfig, max_norm: float, tmp_path: Path
) -> None:
    config = replace(near_gradient_descent(train_config), max_grad_norm=max_norm)
    train(config)
    other = tmp_path / "other"
    train(replace(config, train_batch_size=1, gradient_accumulation_steps=2, output_dir=other))
    assert_close(config.output_dir, other)


def test_the_last_checkpoints_stay_and_the_old_ones_go(train_config: TrainConfig) -> None:
    """By their steps: by their names 10 and 12 come before 8."""
    config = replace(train_config, max_train_steps=12, train_batch_size=1)
    train(replace(config, checkpoints_total_limit=2))
    out = train_config.output_dir
    assert {path.name for path in out.glob("checkpoint*")} == {"checkpoint-10", "checkpoint-12"}
    assert resuming.choose(out, "latest") == out / "checkpoint-12"
    SD3ControlNetModel.from_pretrained(out / "checkpoint-12" / "controlnet")


def test_an_unfinished_checkpoint_is_passed_over(
    train_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(train_config)
    out = train_config.output_dir
    for name in ("checkpoint-9.partial", "checkpoint-7.removed", "checkpoint-8"):
        (out / name).mkdir()
    assert [path.name for path in checkpoints.find(out)] == ["checkpoint-2", "checkpoint-4"]
    capsys.readouterr()
    assert resuming.choose(out, "latest") == out / "checkpoint-4"
    # Only the one that bears a checkpoint's name is spoken of.
    assert capsys.readouterr().out == (
        f"train: {out}/checkpoint-8/train_state.json: is missing; going on from checkpoint-4\n"
    )


def test_a_new_run_does_not_mix_with_an_old_one(train_config: TrainConfig) -> None:
    train(train_config)
    with pytest.raises(ConfigError, match=r"holds checkpoint-4 .*--resume-from-checkpoint latest"):
        train(train_config)
    with pytest.raises(ConfigError, match=r"checkpoint-7: no complete checkpoint; .* checkpoint-2"):
        train(replace(train_config, resume_from_checkpoint="checkpoint-7"))
    with pytest.raises(ConfigError, match=r"checkpoint-2: .* holds later ones, checkpoint-4; move"):
        train(replace(train_config, resume_from_checkpoint="checkpoint-2"))
    with pytest.raises(ConfigError, match=r"another shape .num_layers: checkpoint 2, now 1"):
        train(replace(train_config, resume_from_checkpoint="latest", num_controlnet_layers=1))
    with pytest.raises(ConfigError, match=r"checkpoint +now\n  --seed +0 +5"):
        train(replace(train_config, resume_from_checkpoint="latest", seed=5))


def test_resuming_on_another_cache_is_refused(
    train_config: TrainConfig, fresh: PrecomputeConfig
) -> None:
    train(train_config)
    precompute(replace(fresh, resolution=48))
    with pytest.raises(ConfigError, match=r"the cache has other captions, .*latents"):
        train(replace(train_config, resume_from_checkpoint="latest", cache=(str(fresh.cache),)))


def test_going_on_from_a_trained_controlnet(train_config: TrainConfig, tmp_path: Path) -> None:
    train(train_config)
    on = replace(
        train_config,
        output_dir=tmp_path / "on",
        controlnet_model_name_or_path=str(train_config.output_dir),
        num_controlnet_layers=None,
        max_train_steps=1,
        learning_rate=0.0,
        adam_weight_decay=0.0,
    )
    train(on)
    assert same(train_config.output_dir, on.output_dir)
    with pytest.raises(ConfigError, match="no ControlNet in it"):
        train(replace(on, controlnet_model_name_or_path=str(tmp_path), output_dir=tmp_path / "no"))


def test_mixed_precision_trains_float32_weights_without_autocast(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed_in: set[tuple[torch.dtype, bool]] = set()
    forward = CastLinear.forward

    def noting(self: CastLinear, inputs: torch.Tensor) -> torch.Tensor:
        outputs = forward(self, inputs)
        computed_in.add((outputs.dtype, torch.is_autocast_enabled("cpu")))
        return outputs

    monkeypatch.setattr(CastLinear, "forward", noting)
    train(replace(train_config, mixed_precision="bf16"))
    assert computed_in == {(torch.bfloat16, False)}
    assert {tensor.dtype for tensor in weights(train_config.output_dir).values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_a_precision_that_the_device_lacks_is_refused(train_config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="--mixed-precision fp16: accelerate scales no losses"):
        train(replace(train_config, mixed_precision="fp16"))


def test_epochs_count_steps(train_config: TrainConfig) -> None:
    # Ten samples, three a step: four steps an epoch, the last of them reaching into the next.
    config = replace(train_config, max_train_steps=None, num_train_epochs=2, train_batch_size=3)
    train(config)
    assert checkpoints.find(config.output_dir)[-1].name == "checkpoint-7"


def test_pictures_losses_and_rates_are_logged(train_config: TrainConfig) -> None:
    config = replace(
        train_config,
        validation_steps=2,
        num_validation_images=2,
        validation_inference_steps=2,
        report_to="tensorboard",
        logging_steps=2,
    )
    train(config)
    drawn = sorted((config.output_dir / "validation").rglob("*.png"))
    assert [path.relative_to(config.output_dir / "validation").as_posix() for path in drawn] == [
        f"step-00000{step}/{pair}.png" for step in (0, 2, 4) for pair in (0, 1)
    ]
    assert Image.open(drawn[0]).size == (3 * 64, 64)
    events = EventAccumulator(str(config.output_dir / "logs" / "train_controlnet")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    # A quarter of a cosine of three steps after one of warm-up: lr (1 + cos(pi k / 3)) / 2.
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([0.75e-3, 0.0])
    assert [event.value for event in events.Scalars("epoch")] == pytest.approx([0.4, 0.8])
    assert len(events.Tags()["images"]) == 2


def test_the_transformer_and_the_cache_alone_are_enough(
    train_config: TrainConfig, base: Path, cache: Path, tmp_path: Path
) -> None:
    """On another machine: no source, no VAE, no text encoder; and none of them is even built."""
    machine = tmp_path / "machine"
    shutil.copytree(cache, machine / "cache")
    for name in ("transformer", "scheduler"):
        shutil.copytree(base / name, machine / "base" / name)
    config = replace(
        train_config,
        pretrained_model_name_or_path=str(machine / "base"),
        cache=(str(machine / "cache"),),
        output_dir=machine / "out",
    )
    script = machine / "script.py"
    script.write_text(
        "import sys\n"
        "from train.__main__ import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sorted(sys.modules), sep='\\n')\n"
    )
    done = run_python(script, *flags(config), cwd=machine)
    assert done.returncode == 0, done.stderr
    assert (machine / "out" / WEIGHTS).is_file()
    loaded = done.stdout.split()
    assert "diffusers.models.transformers.transformer_sd3" in loaded
    for module in (
        "transformers.modeling_utils",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "diffusers.models.autoencoders.autoencoder_kl",
        "datasets",
    ):
        assert module not in loaded


def test_pictures_need_the_vae(train_config: TrainConfig, base: Path, tmp_path: Path) -> None:
    for name in ("transformer", "scheduler"):
        shutil.copytree(base / name, tmp_path / "base" / name)
    config = replace(train_config, pretrained_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"no vae/ in it.*--validation-decode latents"):
        train(replace(config, validation_steps=1))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(train_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(
        train_config, max_train_steps=60, checkpointing_steps=5, resume_from_checkpoint="latest"
    )
    train(config)
    killed = replace(config, output_dir=tmp_path / "killed")
    arguments = ["-m", "train", *flags(killed)]
    with running(arguments, stderr=subprocess.DEVNULL) as process:
        while not checkpoints.find(killed.output_dir) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    stopped_at = checkpoints.find(killed.output_dir)
    assert stopped_at
    assert stopped_at[-1].name != "checkpoint-60", "the run ended before it could be killed"
    assert not (killed.output_dir / WEIGHTS).exists()
    assert run_python(*arguments).returncode == 0
    assert same(config.output_dir, killed.output_dir)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    config = near_gradient_descent(train_config)
    train(config)
    two = replace(
        config,
        train_batch_size=1,
        output_dir=tmp_path / "two",
        validation_steps=4,
        num_validation_images=1,
        validation_inference_steps=2,
    )
    train_in_two_processes(two)
    assert_close(config.output_dir, two.output_dir)
    state = checkpoints.read_state(two.output_dir / "checkpoint-4")
    assert (state.step, state.place) == (4, 8)
    drawn = sorted(path.name for path in two.output_dir.glob("validation/step-000004/*"))
    assert drawn == ["0.png", "1.png"]


def test_an_incomplete_cache_says_what_is_there(
    train_config: TrainConfig, cache: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    (tmp_path / "cache" / "text" / "000001.json").unlink()
    outcome = command("train", *flags(replace(train_config, cache=(str(tmp_path / "cache"),))))
    assert outcome.exit_code == 2
    assert "the cache is incomplete, manifest.json is missing" in outcome.output
    assert "text: 5 finished, missing 000001" in outcome.output
    assert "Run the same python -m precompute command again" in outcome.output
    assert not train_config.output_dir.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda cache: (cache / "latents" / "000000.json").unlink(),
            "missing, though.* counts on it",
        ),
        (lambda cache: os.truncate(cache / "latents" / "000000.tar", 2000), "cut short"),
        (lambda cache: (cache / "text" / "000001.tar").unlink(), "000001.tar: missing"),
        (lambda cache: (cache / "manifest.json").write_text("{"), "manifest.json: damaged"),
    ],
)
def test_a_damaged_cache_stops_training_with_the_shards_name(
    train_config: TrainConfig,
    cache: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    damage(copy)
    with pytest.raises(ShardError, match=message):
        train(replace(train_config, cache=(str(copy),), max_train_steps=8))


def test_damage_met_in_a_worker_is_one_error(
    train_config: TrainConfig, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    path = copy / "latents" / "000000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    config = replace(train_config, cache=(str(copy),), max_train_steps=8, dataloader_num_workers=1)
    with pytest.raises(
        ShardError, match=r"^[^\n]*000000\.tar: record [^\n]*: damaged record[^\n]*$"
    ):
        train(config)


@pytest.mark.parametrize("flag", MISPLACED)
def test_what_moved_to_precompute_says_so(flag: str, command: Callable[..., Outcome]) -> None:
    outcome = command("train", flag.replace("-", "_").replace("__", "--", 1), "x")
    assert outcome.exit_code == 2
    assert outcome.output.startswith(f"Error: {flag}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 0}, "--train-batch-size 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"precondition_outputs": 2}, "--precondition-outputs 2"),
        ({"proportion_empty_prompts": 1.5}, "--proportion-empty-prompts 1.5"),
    ],
)
def test_wrong_settings_are_refused(
    train_config: TrainConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(train_config, **change)
