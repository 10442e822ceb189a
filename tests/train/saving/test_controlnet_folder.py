"""The files of a saved ControlNet: replaced whole, compared whole."""

from dataclasses import replace
from pathlib import Path

from train.config import TrainConfig
from train.run import train
from train.saving.controlnet import _put_in_place, is_same_controlnet

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PARTS = [f"diffusion_pytorch_model-0000{part}-of-00002.safetensors" for part in (1, 2)]


def make(folder: Path, **contents: str) -> Path:
    folder.mkdir()
    for name, text in {CONFIG: "{}", **contents}.items():
        (folder / name).write_text(text)
    return folder


def test_no_weights_of_an_earlier_one_stay_beside_the_new(tmp_path: Path) -> None:
    out = make(tmp_path / "out", **dict.fromkeys(PARTS, "old"), **{"run.json": "kept"})
    _put_in_place(make(out / "controlnet.partial", **{WEIGHTS: "new"}), out)
    assert {path.name for path in out.iterdir()} == {CONFIG, WEIGHTS, "run.json"}
    assert (out / WEIGHTS).read_text() == "new"


def test_two_are_the_same_only_if_all_their_files_are(tmp_path: Path) -> None:
    one = make(tmp_path / "one", **{WEIGHTS: "1234"})
    assert is_same_controlnet(one, make(tmp_path / "same", **{WEIGHTS: "1234"}))
    assert not is_same_controlnet(one, make(tmp_path / "other", **{WEIGHTS: "1235"}))
    assert not is_same_controlnet(one, make(tmp_path / "less"))
    assert not is_same_controlnet(make(tmp_path / "none"), one)


def test_all_files_of_a_run_have_the_usual_permissions(train_config: TrainConfig) -> None:
    """The safetensors library lets only the owner read what it writes."""
    config = replace(
        train_config,
        validation_steps=4,
        validation_inference_steps=2,
        validation_decode="latents",
        ema_decay=0.5,
    )
    train(config)
    usual = config.output_dir / "usual"
    usual.touch()
    files = [path for path in config.output_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".md", ".pkl", ".bin"}
    assert len([path for path in files if "validation" in path.parts]) > 1
    unlike = [path for path in files if path.stat().st_mode != usual.stat().st_mode]
    assert not unlike
