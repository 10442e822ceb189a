"""The options: those of diffusers' script, where each of them went, and no other by accident."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from common.config_file import switches
from precompute.config import PrecomputeConfig
from precompute.misplaced_options import MISPLACED as NOT_IN_PRECOMPUTE
from precompute.misplaced_options import TRAIN_OPTIONS
from tests.conftest import run_python
from train.config import TrainConfig
from train.misplaced_options import MISPLACED as NOT_IN_TRAIN
from train.misplaced_options import PRECOMPUTE_OPTIONS

# Name and default of every option of diffusers' train_controlnet_sd3.py.
REFERENCE = {
    "pretrained_model_name_or_path": None,
    "controlnet_model_name_or_path": None,
    "num_extra_conditioning_channels": 0,
    "revision": None,
    "variant": None,
    "output_dir": "controlnet-model",
    "cache_dir": None,
    "seed": None,
    "resolution": 512,
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "upcast_vae": False,
    "learning_rate": 5e-6,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "use_8bit_adam": False,
    "dataloader_num_workers": 0,
    "weighting_scheme": "logit_normal",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
    "precondition_outputs": 1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "allow_tf32": False,
    "report_to": "tensorboard",
    "mixed_precision": None,
    "set_grads_to_none": False,
    "dataset_name": None,
    "dataset_config_name": None,
    "image_column": "image",
    "conditioning_image_column": "conditioning_image",
    "caption_column": "text",
    "train_data_dir": None,
    "max_train_samples": None,
    "proportion_empty_prompts": 0,
    "max_sequence_length": 77,
    "dataset_preprocess_batch_size": 1000,
    "validation_prompt": None,
    "validation_image": None,
    "num_validation_images": 4,
    "validation_steps": 100,
    "tracker_project_name": "train_controlnet",
}
# Kept in precompute under the same name, or gone for the reason that `MISPLACED` gives.
MOVED_TO_PRECOMPUTE = {
    "resolution",
    "dataset_name",
    "dataset_config_name",
    "image_column",
    "conditioning_image_column",
    "caption_column",
    "train_data_dir",
    "max_train_samples",
    "max_sequence_length",
    "validation_prompt",
    "validation_image",
    "num_extra_conditioning_channels",
}
# There in training too, but to describe a cache that is yet to be made, for --estimate alone.
FOR_ESTIMATES = {"resolution", "max_sequence_length"}
GONE = {
    "upcast_vae",
    "set_grads_to_none",
    "dataset_preprocess_batch_size",
}
# A seed is always there: whoever gives none gets 0, and the run can be repeated.
OTHER_DEFAULTS = {"seed": 0}
# Accepted, and another way to say a value of an option of ours.
SWITCHES = {
    "gradient_checkpointing": ("checkpointing", {True: "controlnet", False: "none"}),
    "use_8bit_adam": ("optimizer", {True: "adamw8bit", False: "adamw"}),
}
OURS = {
    "cache",
    "dropout_t5",
    "dropout_clip",
    "dropout_pooled",
    "dropout_control",
    "weights",
    "repeats",
    "checkpointing",
    "local_cache_dir",
    "local_cache_gb",
    "conditioning_name",
    "single_file_config",
    "transformer",
    "lora",
    "lora_scale",
    "num_controlnet_layers",
    "convention",
    "controlnet_kind",
    "pooled_projection",
    "shuffle_window",
    "on_nonfinite",
    "optimizer",
    "optimizer_args",
    "quantize_base",
    "bf16_weights",
    "offload_optimizer",
    "offload_activations",
    "offload_base",
    "estimate",
    "fused_backward_pass",
    "compile",
    "deterministic",
    "ema_decay",
    "dashboard",
    "evaluate",
    "keep_best",
    "shift",
    "min_timestep",
    "max_timestep",
    "stratified_timesteps",
    "validation_batch_size",
    "validation_inference_steps",
    "validation_guidance_scale",
    "validation_decode",
    "logging_steps",
}
Command = Callable[..., Any]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


TRAIN = {field.name: field.default for field in fields(TrainConfig)}
PRECOMPUTE = {field.name: field.default for field in fields(PrecomputeConfig)}


def test_every_option_of_the_reference_is_somewhere() -> None:
    for misplaced in (NOT_IN_TRAIN, NOT_IN_PRECOMPUTE):
        assert {flag(name) for name in GONE} <= misplaced.keys()
    moved = MOVED_TO_PRECOMPUTE - FOR_ESTIMATES
    assert {flag(name) for name in moved} <= set(PRECOMPUTE_OPTIONS)
    assert switches(TrainConfig) == SWITCHES
    assert (
        SWITCHES["gradient_checkpointing"][1][REFERENCE["gradient_checkpointing"]]
        == (TRAIN["checkpointing"])
    )
    kept = REFERENCE.keys() & (TRAIN.keys() | SWITCHES.keys())
    assert REFERENCE.keys() == kept | MOVED_TO_PRECOMPUTE | GONE
    assert TRAIN.keys() & (MOVED_TO_PRECOMPUTE | GONE) == FOR_ESTIMATES


def test_each_stage_knows_the_options_of_the_other() -> None:
    # Of precompute's own, --device is accelerate's in training, and there has its own sentence.
    assert {*PRECOMPUTE_OPTIONS, "--device"} == {
        flag(name) for name in PRECOMPUTE.keys() - TRAIN.keys()
    }
    # precompute takes --output-dir as another name of --cache.
    assert {*TRAIN_OPTIONS, "--output-dir"} == {
        flag(name) for name in (TRAIN.keys() | SWITCHES.keys()) - PRECOMPUTE.keys()
    }
    for misplaced, own in ((NOT_IN_TRAIN, TRAIN), (NOT_IN_PRECOMPUTE, PRECOMPUTE)):
        assert not misplaced.keys() & {flag(name) for name in own}


def test_options_of_the_other_stage_are_all_reported_at_once(command: Command) -> None:
    done = command("precompute", "--learning_rate", "1e-5", "--source", "x", "--max-train-steps=9")
    assert done.exit_code == 2
    assert "--learning-rate: belongs to python -m train." in done.output
    assert "--max-train-steps: belongs to python -m train." in done.output
    done = command("train", "--split", "x", "--cache", "x", "--validation_prompt", "a", "b")
    assert done.exit_code == 2
    assert "--split: belongs to python -m precompute" in done.output
    assert "--validation-prompt: belongs to python -m precompute" in done.output


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        ((), "full"),
        (("--gradient_checkpointing",), "controlnet"),
        (("--checkpointing", "none"), "none"),
    ],
)
def test_the_references_checkpointing_is_that_of_the_controlnet(
    arguments: tuple[str, ...],
    level: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr("train.run.train", seen.append)
    (tmp_path / "run.toml").write_text('[train]\ncheckpointing = "full"\n')
    base = ("--pretrained-model-name-or-path", "x", "--cache", "x")
    command("train", "--config", tmp_path / "run.toml", *base, *arguments)
    assert [config.checkpointing for config in seen] == [level]


def test_the_cache_has_one_name_and_the_old_ones_still_work(command: Command) -> None:
    for stage, old in (
        ("precompute", "--output-dir"),
        ("precompute", "--shards"),
        ("train", "--shards"),
    ):
        base = ("--pretrained-model-name-or-path", "nowhere", "--source", "nowhere")
        done = command(stage, old, "nowhere", *(base if stage == "precompute" else base[:2]))
        assert "No such option" not in done.output
        assert "Missing option" not in done.output
        assert old not in command(stage, "--help").output.replace("--output-dir PATH", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["precompute"],
        ["train"],
        ["infer", "generate"],
        ["infer", "score"],
        ["infer", "serve"],
        ["infer", "decode"],
        ["demo.circles"],
    ],
    ids=" ".join,
)
def test_a_command_without_options_names_one_that_is_missing(arguments: list[str]) -> None:
    done = run_python("-m", *arguments)
    assert done.returncode == 2
    assert "Missing option" in done.stderr
    assert "Traceback" not in done.stderr


def test_stages_keep_out_of_each_others_folders(
    command: Command, cache: Path, base: Path, tmp_path: Path
) -> None:
    model = ("--pretrained-model-name-or-path", base)
    before = (cache / "run.json").read_bytes()
    done = command("train", *model, "--cache", cache, "--output-dir", cache)
    assert done.exit_code == 2
    assert f"--output-dir {cache}: holds a cache; give another folder." in done.output
    assert (cache / "run.json").read_bytes() == before
    done = command("precompute", *model, "--source", "x", "--cache", "s3://bucket/cache")
    assert done.exit_code == 2
    assert "precompute writes to a folder of this machine" in done.output
    assert not Path("s3:").exists()


def test_there_are_no_others() -> None:
    assert TRAIN.keys() - REFERENCE.keys() == OURS


def test_the_base_model_is_required_here_as_there() -> None:
    assert TRAIN["pretrained_model_name_or_path"] is MISSING
    assert PRECOMPUTE["pretrained_model_name_or_path"] is MISSING


@pytest.mark.parametrize(
    "name",
    sorted(REFERENCE.keys() - GONE - SWITCHES.keys() - {"pretrained_model_name_or_path"}),
)
def test_defaults_are_the_references(name: str) -> None:
    default = PRECOMPUTE[name] if name in MOVED_TO_PRECOMPUTE else TRAIN[name]
    expected = OTHER_DEFAULTS.get(name, REFERENCE[name])
    if isinstance(default, Path):
        default = str(default)
    assert default == (() if expected is None and default == () else expected)
