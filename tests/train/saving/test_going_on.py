"""What a run starts from: weights that are numbers, and a ControlNet of known conventions."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ConfigError, RunError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.controlnet.pooled_projection import FORCE_ZEROS
from sd3.finite import nonfinite_weight
from sd3.pretrained import DATA_KEY, read_config
from shards.format.specs import AnnotatorSpec
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, Outcome, Spoil, flags
from tests.train.test_run import WEIGHTS, same, weights
from train.config import TrainConfig
from train.continued.convention import check_convention
from train.optim.optimizer import make_optimizer
from train.run import train
from train.saving import checkpoints, resuming
from train.sets.data_entry import data_entry

INFER = ("--width", 64, "--height", 64, "--num-inference-steps", 1, "--device", "cpu")


def spoil(path: Path, name: str, value: float) -> None:
    tensors = load_file(path)
    tensors[name].view(-1)[1] = value
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, edit: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | edit
    path.write_text(json.dumps({name: config[name] for name in config if name not in without}))


BLUR = {"name": "blur", "arguments": {"radius": 2}, "digest": "12"}
CONVERTED = {FORCE_ZEROS: False}
CANNY = AnnotatorSpec("canny", {"low_threshold": 100}, "34")


@pytest.fixture
def start(controlnet: Path, tmp_path: Path) -> Path:
    """A copy of a ControlNet with a say, to be edited."""
    return Path(shutil.copytree(controlnet, tmp_path / "start"))


@pytest.fixture
def going_on(train_config: TrainConfig, start: Path) -> TrainConfig:
    """One step from that ControlNet which changes nothing."""
    return replace(
        train_config,
        controlnet_model_name_or_path=str(start),
        num_controlnet_layers=None,
        max_train_steps=1,
        learning_rate=0.0,
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    whole = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    broken = whole.clone()
    broken[1, 700] = value
    counts = torch.arange(3)
    assert nonfinite_weight([("counts", counts), ("whole", whole)]) is None
    assert nonfinite_weight([("counts", counts), ("whole", whole), ("broken", broken)]) == "broken"
    assert nonfinite_weight([("none", torch.empty(0))]) is None


def test_a_run_does_not_start_from_weights_that_are_not_finite(
    going_on: TrainConfig, start: Path
) -> None:
    spoil(start / WEIGHTS, "pos_embed_input.proj.bias", torch.nan)
    name = r"--controlnet-model-name-or-path .*: the weight pos_embed_input\.proj\.bias is not"
    with pytest.raises(ConfigError, match=name):
        train(replace(going_on, on_nonfinite="skip"))


def test_a_run_does_not_start_from_a_base_that_is_not_finite(
    train_config: TrainConfig, base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    spoil(copy / "transformer" / WEIGHTS, "proj_out.bias", torch.inf)
    config = replace(train_config, pretrained_model_name_or_path=str(copy))
    with pytest.raises(ConfigError, match=r"base model .*: the weight proj_out\.bias is not"):
        train(replace(config, on_nonfinite="skip"))


def test_weights_that_are_no_longer_finite_are_never_saved(
    train_config: TrainConfig, in_batch: Callable[[int, Spoil], None]
) -> None:
    def ruin(losses: Tensor, controlnet: Any) -> Tensor:
        with torch.no_grad():
            controlnet.pos_embed_input.proj.bias[2] = torch.nan
        return losses

    in_batch(3, ruin)
    config = replace(train_config, on_nonfinite="skip")
    with pytest.raises(
        RunError,
        match=r"checkpoint-4 could not be written \(the weight pos_embed_input\.proj\.bias is no "
        r"longer finite.*\); checkpoint-2 is kept\.$",
    ):
        train(config)
    assert [path.name for path in checkpoints.find(config.output_dir)] == ["checkpoint-2"]
    assert not (config.output_dir / WEIGHTS).exists()
    assert not list(config.output_dir.glob("*.partial"))


def test_a_controlnet_that_is_not_finite_draws_nothing(
    start: Path, base: Path, circles: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    spoil(start / WEIGHTS, "controlnet_blocks.0.bias", torch.nan)
    earlier = tmp_path / "pictures" / "000.png"
    earlier.parent.mkdir()
    earlier.write_bytes(b"drawn otherwise")
    outcome = command(
        *("infer", "generate", "--controlnet", start, "--pretrained-model-name-or-path", base),
        *("--prompt", "a circle", "--image", circles / "source" / "0.png"),
        *("--output-dir", tmp_path / "pictures", *INFER),
    )
    assert outcome.exit_code == 2, outcome.output
    last = outcome.output.strip().splitlines()[-1]
    assert last.startswith(f"Error: --controlnet {start}, as ")
    assert "the weight controlnet_blocks.0.bias is not finite" in last
    assert earlier.read_bytes() == b"drawn otherwise"
    assert "are replaced" not in outcome.output
    assert list(tmp_path.glob("pictures/**/*.png")) == [earlier]


def test_another_number_of_blocks_is_refused_beside_a_controlnet(
    going_on: TrainConfig, start: Path
) -> None:
    own = read_config(start, "")["num_layers"]
    train(replace(going_on, num_controlnet_layers=own))
    wrong = replace(
        going_on, num_controlnet_layers=own + 1, output_dir=going_on.output_dir / "other"
    )
    expected = f"^--num-controlnet-layers {own + 1}: is for a new ControlNet; .* has {own}. Leave"
    with pytest.raises(ConfigError, match=expected):
        train(wrong)


def test_a_controlnet_of_another_conditioning_range_is_refused(
    going_on: TrainConfig, start: Path
) -> None:
    edit_config(start, {DATA_KEY: {"conditioning_range": "0_1", "max_sequence_length": 20}})
    with pytest.raises(
        ConfigError,
        match=r"was trained on conditioning images in 0_1, and the cache's are in -1_1\. .*"
        "python -m precompute with --conditioning-range 0_1 --conditioning-name in_0_1",
    ) as caught:
        train(going_on)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"conditioning_range": "-1_1", "max_sequence_length": 20}, None),
        (
            {"conditioning_range": "-1_1", "max_sequence_length": 77},
            "was trained with 77 T5 tokens, and goes on with the cache's 20",
        ),
        (
            {
                "conditioning_range": "-1_1",
                "annotator": BLUR,
            },
            "the conditioning images of its training were drawn by blur (radius=2), and the "
            "cache's came with its data",
        ),
        (None, "does not say how its data was made; it goes on with conditioning images in -1_1"),
    ],
)
def test_what_changes_is_said(
    going_on: TrainConfig,
    start: Path,
    command: Callable[..., Outcome],
    data: dict[str, Any] | None,
    line: str | None,
) -> None:
    edit_config(start, {DATA_KEY: data} if data else {}, () if data else (DATA_KEY,))
    outcome = command("train", *flags(going_on))
    assert outcome.exit_code == 0, outcome.output
    said = [one for one in outcome.output.splitlines() if "--controlnet-model-name" in one]
    assert [line in one for one in said] == ([True] if line else [])
    assert same(start, going_on.output_dir)
    saved = SD3ControlNetModel.load_config(going_on.output_dir)
    assert saved[DATA_KEY]["max_sequence_length"] == 20


def data_of(cache: Cache, **changes: Any) -> dict[str, Any]:
    """The entry of a ControlNet that was trained on a cache, with changes; None removes one."""
    entry = data_entry(cache.manifest, cache.conditioning_name) | changes
    return {DATA_KEY: {name: value for name, value in entry.items() if value is not None}}


@pytest.mark.parametrize(
    ("trained", "annotator", "scale", "lines"),
    [
        ({}, None, None, []),
        ({}, CANNY, "0:5000", []),
        ({"annotator": {**asdict(CANNY), "name": "renamed.py:canny"}}, CANNY, None, []),
        (
            {"annotator": BLUR},
            CANNY,
            None,
            ["were drawn by blur (radius=2), and the cache's are drawn by canny (low_thr"],
        ),
        ({"annotator": BLUR}, None, None, ["blur (radius=2), and the cache's came with its data"]),
        (
            {"annotator": None},
            CANNY,
            None,
            ["by nothing that its config.json names, and the cache's are drawn by canny (low_th"],
        ),
        (
            {"annotator": asdict(replace(CANNY, digest="56"))},
            CANNY,
            None,
            ["drawn by canny (low_threshold=100) of other code or weights than the cache's"],
        ),
        (
            {"conditioning_scale": "auto", "background": [0, 0, 0]},
            None,
            "0:5000",
            [
                "scale auto, and the cache's are of scale 0:5000",
                "over [0, 0, 0] if transparent, and",
            ],
        ),
        # As versions of this program wrote it that knew no scale.
        ({"conditioning_scale": None}, None, "auto", ["scale as-is, and the cache's are of scale"]),
        (
            {"annotator": BLUR, "conditioning_scale": None},
            None,
            "auto",
            ["blur (radius=2), and the cache's", "scale as-is, and the cache's are of scale auto"],
        ),
    ],
)
def test_each_difference_of_the_controls_is_a_line(
    cache: Path,
    trained: dict[str, Any],
    annotator: AnnotatorSpec | None,
    scale: str | None,
    lines: list[str],
) -> None:
    now = Cache(cache)
    now.manifest.annotators.update({} if annotator is None else {"conditioning": annotator})
    now.conditioning_spec = replace(now.conditioning_spec, scale=scale)
    now.manifest.conditioning_specs["conditioning"] = now.conditioning_spec
    said = check_convention("it", data_of(now, **trained) | CONVERTED, now)
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert line.startswith("--controlnet-model-name-or-path it: ")
        assert part in line


def as_instantx_made_it(start: Path, says_so: bool = True) -> None:
    """Their configurations have the entry, or leave it out, for which diffusers takes true."""
    edit_config(
        start,
        {FORCE_ZEROS: True} if says_so else {},
        (DATA_KEY, *(() if says_so else (FORCE_ZEROS,))),
    )


@pytest.mark.parametrize("says_so", [True, False])
def test_a_controlnet_as_instantx_made_it_stays_one(
    going_on: TrainConfig, start: Path, command: Callable[..., Outcome], says_so: bool
) -> None:
    as_instantx_made_it(start, says_so)
    outcome = command("train", *flags(going_on))
    assert outcome.exit_code == 0, outcome.output
    assert "no VAE shift, by its config.json; it goes on so. If train_contr" in outcome.output
    assert same(start, going_on.output_dir)
    saved = json.loads((going_on.output_dir / "config.json").read_text())
    assert saved["force_zeros_for_pooled_projection"] is True
    # Of what was made here nobody asks whether diffusers' script made it.
    again = replace(
        going_on,
        controlnet_model_name_or_path=str(going_on.output_dir),
        output_dir=going_on.output_dir / "again",
    )
    outcome = command("train", *flags(again))
    assert outcome.exit_code == 0, outcome.output
    assert "pooled" not in outcome.output
    assert read_config(again.output_dir, "")["force_zeros_for_pooled_projection"] is True


def test_a_controlnet_as_instantx_made_it_is_converted_where_that_is_asked_for(
    going_on: TrainConfig, start: Path, command: Callable[..., Outcome]
) -> None:
    as_instantx_made_it(start)
    outcome = command("train", *flags(replace(going_on, pooled_projection="prompt")))
    assert outcome.exit_code == 0, outcome.output
    assert "it is converted to take both and computes the same" in outcome.output
    ours = SD3ControlNetModel.from_pretrained(going_on.output_dir)
    theirs = SD3ControlNetModel.from_pretrained(start)
    assert (ours.config[FORCE_ZEROS], theirs.config[FORCE_ZEROS]) == (False, True)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 16, 8, 8, generator=generator)
    pooled = torch.randn(2, 80, generator=generator)
    common = {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=generator),
        "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 97, 96, generator=generator),
        "return_dict": False,
    }
    scale, shift = 1.5305, 0.0609  # of the VAE
    with torch.no_grad():
        # As the stock pipeline drives each of them.
        expected = theirs(
            controlnet_cond=raw * scale, pooled_projections=torch.zeros_like(pooled), **common
        )[0]
        found = ours(controlnet_cond=(raw - shift) * scale, pooled_projections=pooled, **common)[0]
        other = theirs(controlnet_cond=(raw - shift) * scale, pooled_projections=pooled, **common)[
            0
        ]
    for one, same_one, different in zip(expected, found, other, strict=True):
        torch.testing.assert_close(same_one, one, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(different, one, rtol=1e-3, atol=1e-3)


def test_a_converted_controlnet_learns_from_the_pooled_embedding(
    going_on: TrainConfig, start: Path
) -> None:
    edit_config(start, {FORCE_ZEROS: True})
    converted = replace(going_on, pooled_projection="prompt")
    train(replace(converted, learning_rate=1e-3, max_train_steps=2))
    assert weights(going_on.output_dir)["time_text_embed.text_embedder.linear_1.weight"].any()


def test_a_controlnet_loses_the_pooled_embedding_where_that_is_asked_for(
    going_on: TrainConfig, start: Path, command: Callable[..., Outcome]
) -> None:
    outcome = command("train", *flags(replace(going_on, pooled_projection="zeros")))
    assert outcome.exit_code == 0, outcome.output
    assert "it is converted to take neither." in outcome.output
    ours = SD3ControlNetModel.from_pretrained(going_on.output_dir)
    theirs = SD3ControlNetModel.from_pretrained(start)
    assert (ours.config[FORCE_ZEROS], theirs.config[FORCE_ZEROS]) == (True, False)
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 16, 8, 8, generator=generator)
    common = {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=generator),
        "timestep": torch.tensor([3.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 97, 96, generator=generator),
        "pooled_projections": torch.zeros(2, 80),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = theirs(controlnet_cond=(raw - 0.0609) * 1.5305, **common)[0]
        found = ours(controlnet_cond=raw * 1.5305, **common)[0]
    for one, same_one in zip(expected, found, strict=True):
        torch.testing.assert_close(same_one, one, rtol=1e-5, atol=1e-5)


def test_a_controlnet_of_diffusers_script_goes_on_as_it_was_trained(
    going_on: TrainConfig,
    start: Path,
    base: Path,
    circles: Path,
    fresh: PrecomputeConfig,
    command: Callable[..., Outcome],
) -> None:
    """It draws as the stock pipeline with pixels in [0, 1] and the entry corrected."""
    as_instantx_made_it(start)  # so does the script's configuration look
    precompute(replace(fresh, conditioning_range="0_1"))
    config = replace(
        going_on,
        cache=(str(fresh.cache),),
        convention="train_controlnet_sd3",
        validation_steps=1,
        num_validation_images=1,
        validation_inference_steps=2,
        validation_guidance_scale=1.0,
    )
    outcome = command("train", *flags(config))
    assert outcome.exit_code == 0, outcome.output
    notes = [one for one in outcome.output.splitlines() if "--controlnet-model-name" in one]
    assert [note.rpartition(": ")[2] for note in notes] == [
        "was trained with 77 T5 tokens, and goes on with the cache's 20"
    ]
    assert same(start, config.output_dir)
    saved = read_config(config.output_dir, "")
    assert saved["force_zeros_for_pooled_projection"] is False
    assert saved[DATA_KEY]["conditioning_range"] == "0_1"
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base, controlnet=SD3ControlNetModel.from_pretrained(config.output_dir)
    )
    image = Image.open(circles / "source" / "0.png").convert("RGB")
    image = image.resize((RESOLUTION_PX, RESOLUTION_PX), Image.Resampling.BILINEAR)
    (stock,) = pipeline(
        PROMPTS[0],
        control_image=torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255,
        height=RESOLUTION_PX,
        width=RESOLUTION_PX,
        num_inference_steps=2,
        guidance_scale=1.0,
        latents=torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(config.seed)),
        max_sequence_length=TOKENS,
        output_type="np",
    ).images
    with Image.open(config.output_dir / "validation/step-000001/0.png") as drawn:
        found = np.split(np.asarray(drawn) / 255, 2, axis=1)[1]
    assert np.abs(found - stock).max() < 2.5 / 255


def test_where_the_scripts_convention_makes_no_sense(going_on: TrainConfig, start: Path) -> None:
    with pytest.raises(ConfigError, match="--convention train_controlnet_sd3: is about the Contr"):
        replace(going_on, convention="train_controlnet_sd3", controlnet_model_name_or_path=None)
    script = replace(going_on, convention="train_controlnet_sd3")
    with pytest.raises(ConfigError, match=r"was trained by python -m train, as its config\.json"):
        train(script)
    as_instantx_made_it(start)
    with pytest.raises(ConfigError, match="was trained on conditioning images in 0_1, and the cac"):
        train(script)


def test_a_run_keeps_its_convention_when_it_is_resumed(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    zeros = replace(train_config, pooled_projection="zeros", lr_scheduler="constant")
    train(zeros)
    parts = replace(zeros, output_dir=tmp_path / "parts")
    train(replace(parts, max_train_steps=2))
    resumed = replace(parts, resume_from_checkpoint="latest", pooled_projection=None)
    train(resumed)
    assert same(zeros.output_dir, parts.output_dir)
    assert read_config(parts.output_dir, "")["force_zeros_for_pooled_projection"] is True
    with pytest.raises(
        ConfigError,
        match="checkpoint-4: was trained with --pooled-projection zeros, and this is prompt",
    ) as caught:
        train(replace(resumed, pooled_projection="prompt"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "other"),
    [
        ("adamw", "adamw8bit"),
        pytest.param("adamw8bit", "adamw", marks=pytest.mark.extras),
    ],
)
def test_another_form_of_state_is_refused(
    optimizer: str, other: str, offload: bool, train_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(train_config, optimizer=optimizer, offload_optimizer=offload)
    parameter = torch.nn.Parameter(torch.ones(5000))
    made = make_optimizer(config, [parameter], 1)
    checkpoint = tmp_path / "checkpoint-500"
    checkpoint.mkdir()

    def check(wanted: str) -> None:
        torch.save(made.state_dict(), checkpoint / "optimizer.bin")
        resuming.check_same_optimizer(checkpoint, replace(config, optimizer=wanted))

    check(other)  # has no state yet
    parameter.grad = torch.ones(5000)
    made.step()
    check(optimizer)
    changed = f"checkpoint-500: holds .*: --optimizer was {optimizer} and is {other}. Give what"
    with pytest.raises(ConfigError, match=changed):
        check(other)


def test_a_state_in_8_bit_is_refused_before_networks_are_loaded(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without bitsandbytes: by the names that it gives the two moments."""
    train(replace(train_config, max_train_steps=1))
    checkpoint = train_config.output_dir / "checkpoint-1"
    saved = torch.load(checkpoint / "optimizer.bin")
    for state in saved["state"].values():
        state["state1"], state["state2"] = state.pop("exp_avg"), state.pop("exp_avg_sq")
    torch.save(saved, checkpoint / "optimizer.bin")
    path = checkpoint / "train_state.json"  # as before there were digests
    state = {name: entry for name, entry in json.loads(path.read_text()).items() if name != "files"}
    del state["digest"]
    path.write_text(json.dumps(state))
    monkeypatch.setattr("train.assembly._load_networks", None)
    with pytest.raises(ConfigError, match=r"checkpoint-1: .* was adamw8bit and is adamw\."):
        train(replace(train_config, resume_from_checkpoint="latest"))


def test_another_number_of_samples_a_step_is_said(
    train_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(replace(train_config, max_train_steps=1))
    resumed = replace(train_config, resume_from_checkpoint="latest")
    train(replace(resumed, max_train_steps=2, train_batch_size=1, gradient_accumulation_steps=2))
    assert "samples, and takes" not in capsys.readouterr().out
    train(replace(resumed, max_train_steps=3, gradient_accumulation_steps=3))
    said = (
        "checkpoint-2: a step took 2 samples, and takes 6 from now on: --train-batch-size was 1 "
        "and is 2, --gradient-accumulation-steps was 2 and is 3\n"
    )
    assert said in capsys.readouterr().out


def test_another_base_is_said(
    train_config: TrainConfig, base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(replace(train_config, max_train_steps=1))
    resumed = replace(train_config, resume_from_checkpoint="latest")
    train(replace(resumed, max_train_steps=2))
    assert "another base" not in capsys.readouterr().out
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    train(replace(resumed, max_train_steps=3, pretrained_model_name_or_path=str(moved)))
    assert (
        "checkpoint-2: another base from now on: --pretrained-model-name-or-path was "
        f"{base} and is {moved}\n"
    ) in capsys.readouterr().out
