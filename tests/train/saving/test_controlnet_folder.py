"""The files of a saved ControlNet: replaced whole, compared whole."""

from pathlib import Path

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
