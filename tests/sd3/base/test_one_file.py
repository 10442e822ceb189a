"""One-file checkpoints under the published names: the same weights as the folder's."""

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import demo.base_model.pipeline
from common.errors import ConfigError
from infer.config import GenerateConfig
from infer.drawing.generate import generate
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.base.contents import LARGE_35, MEDIUM, MEDIUM_35, read_contents
from sd3.base.find import find_base
from tests.conftest import PROMPTS, flags, four_steps, narrow_posterior
from tests.hub_server import Hub
from tests.published_names import one_file, transformer
from train.run import train

WEIGHTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
ALL = (*WEIGHTS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 4, "qk_norm": None},
    "sd35-medium": {"num_layers": 4, "dual_attention_layers": (0, 1, 2)},
    "sd35-large": {"num_layers": 6, "num_attention_heads": 6},
}


def build(architecture: str = "sd3-medium") -> Any:
    """Return a pipeline whose first CLIP encoder does not project, as in the published models."""
    pipeline = demo.base_model.pipeline.build_pipeline(0, **ARCHITECTURES[architecture])
    narrow_posterior(pipeline.vae)
    with torch.no_grad():
        projection = pipeline.text_encoder.text_projection.weight
        projection.copy_(torch.eye(len(projection)))
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return build()


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("one-file") / "folder"
    demo.base_model.pipeline.save_base(saved, pipeline)
    return saved


def weights(component: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in component.glob("*.safetensors"):
        found |= load_file(path)
    found.pop("encoder.embed_tokens.weight", None)  # T5's, of which `shared.weight` is another name
    return found


def assert_same(found: Path, expected: Path, components: tuple[str, ...] = WEIGHTS) -> None:
    for name in components:
        torch.testing.assert_close(
            weights(found / name), weights(expected / name), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_weights_are_the_folders(architecture: str, tmp_path: Path) -> None:
    pipeline = build(architecture)
    demo.base_model.pipeline.save_base(tmp_path / "folder", pipeline)
    save_file(one_file(pipeline), tmp_path / "model.safetensors")
    found = find_base(
        str(tmp_path / "model.safetensors"),
        ALL,
        single_file_config=str(tmp_path / "folder"),
        cache_dir=tmp_path,
    )
    assert_same(found, tmp_path / "folder")
    for name in ALL:
        assert any((found / name).glob("*.json"))
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in found.glob("*/*.safetensors"))


def test_all_stages_make_of_it_what_they_make_of_the_folder(
    pipeline: Any,
    folder: Path,
    precompute_config: PrecomputeConfig,
    circles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same records, trained weights and pixels, to the bit."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    file = tmp_path / "model.safetensors"
    save_file(one_file(pipeline), file)
    of_file = {"pretrained_model_name_or_path": str(file), "single_file_config": str(folder)}
    of_folder = {"pretrained_model_name_or_path": str(folder)}
    for name, options in (("folder", of_folder), ("file", of_file)):
        home = tmp_path / name
        precompute(replace(precompute_config, cache=home / "cache", **options))
        config = replace(four_steps(folder, home / "cache", home / "out"), **options)
        train(replace(config, validation_steps=4, validation_inference_steps=2))
        generate(
            GenerateConfig(
                **options,
                controlnet=(str(home / "out"),),
                output_dir=home / "drawn",
                prompt=PROMPTS[:1],
                image=(circles / "source" / "0.png",),
                num_inference_steps=2,
                device="cpu",
            )
        )
    made = [
        path.relative_to(tmp_path / "folder")
        for pattern in ("cache/**/*.tar", "out/*.safetensors", "out/**/*.png", "drawn/*.png")
        for path in (tmp_path / "folder").glob(pattern)
    ]
    assert {path.parts[0] for path in made} == {"cache", "out", "drawn"}
    for path in made:
        ours, theirs = tmp_path / "file" / path, tmp_path / "folder" / path
        if path.suffix == ".png":
            assert np.array_equal(np.array(Image.open(ours)), np.array(Image.open(theirs))), path
        elif path.suffix == ".safetensors":
            assert weights(ours.parent).keys() == weights(theirs.parent).keys()
            torch.testing.assert_close(weights(ours.parent), weights(theirs.parent), rtol=0, atol=0)
        else:
            assert tensors_of(ours) == tensors_of(theirs), path


def tensors_of(shard: Path) -> list[bytes]:
    """Return the tensors of a shard, in order, without what names the model."""
    with tarfile.open(shard) as tar:
        return [
            tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.name.endswith(".safetensors")
        ]


@pytest.mark.slow
def test_train_reads_it_as_a_command(
    pipeline: Any, folder: Path, cache: Path, tmp_path: Path
) -> None:
    """Training hides libraries from diffusers that it does not need."""
    save_file(one_file(pipeline, text=False), tmp_path / "model.safetensors")
    config = replace(
        four_steps(folder, cache, tmp_path / "folder"),
        validation_steps=4,
        validation_inference_steps=2,
    )
    train(config)
    of_file = replace(
        config,
        output_dir=tmp_path / "file",
        pretrained_model_name_or_path=str(tmp_path / "model.safetensors"),
        single_file_config=str(folder),
        cache_dir=tmp_path / "downloads",
    )
    subprocess.run([sys.executable, "-m", "train", *flags(of_file)], check=True)
    torch.testing.assert_close(
        weights(tmp_path / "file"), weights(tmp_path / "folder"), rtol=1e-5, atol=1e-7
    )


def test_a_hub_out_of_reach_names_the_way_out(
    pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    save_file(one_file(pipeline, text=False), tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=rf"are fetched from {MEDIUM}: .* --single-file-config names a folder"
    ):
        find_base(str(tmp_path / "model.safetensors"), ("vae",), cache_dir=tmp_path / "empty")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_transformer_takes_the_place_of_the_bases(
    prefix: str, folder: Path, tmp_path: Path
) -> None:
    changed = {name: tensor + 1 for name, tensor in weights(folder / "transformer").items()}
    file = tmp_path / "tuned.safetensors"
    save_file({prefix + n: t.clone().contiguous() for n, t in transformer(changed).items()}, file)
    found = find_base(str(folder), ALL, transformer=file, cache_dir=tmp_path)
    torch.testing.assert_close(weights(found / "transformer"), changed, rtol=0, atol=0)
    assert_same(found, folder, WEIGHTS[1:])
    assert not (found / "vae").resolve().is_relative_to(tmp_path)  # a link: no second copy


def test_a_transformer_under_diffusers_names_is_read_too(folder: Path, tmp_path: Path) -> None:
    changed = {name: tensor + 1 for name, tensor in weights(folder / "transformer").items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    found = find_base(
        str(folder), ALL, transformer=tmp_path / "tuned.safetensors", cache_dir=tmp_path
    )
    torch.testing.assert_close(weights(found / "transformer"), changed, rtol=0, atol=0)


def test_what_a_file_lacks_comes_from_the_folder(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    # As sd3.5_medium.safetensors: no text encoders.
    save_file(one_file(pipeline, text=False), tmp_path / "model.safetensors")
    found = find_base(
        str(tmp_path / "model.safetensors"),
        ALL,
        single_file_config=str(folder),
        cache_dir=tmp_path,
    )
    assert (found / "text_encoder_3").is_symlink()
    assert not (found / "vae").is_symlink()
    assert_same(found, folder)


def test_eight_bit_becomes_sixteen_and_sixteen_stays(
    pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    tensors = {name: tensor.half() for name, tensor in one_file(pipeline).items()}
    rounded = {
        name: tensor.to(torch.float8_e4m3fn) if "t5xxl" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(rounded, tmp_path / "model.safetensors")
    found = find_base(
        str(tmp_path / "model.safetensors"),
        ALL,
        single_file_config=str(folder),
        cache_dir=tmp_path,
    )
    for name, dtype in (("transformer", torch.float16), ("text_encoder_3", torch.bfloat16)):
        exact = weights(folder / name)
        for key, tensor in weights(found / name).items():
            expected = exact[key].half()
            if dtype == torch.bfloat16:
                expected = expected.to(torch.float8_e4m3fn).float().bfloat16()
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected)


def test_only_what_is_needed_is_converted_once(
    pipeline: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(one_file(pipeline), file)

    def find(*components: str, **options: Any) -> tuple[Path, list[str]]:
        found = find_base(
            str(file), components, single_file_config=str(folder), cache_dir=tmp_path, **options
        )
        lines = capsys.readouterr().err.splitlines()
        return found, [line.partition("its ")[2].partition(",")[0] for line in lines]

    assert find("vae", weights=False) == (folder, [])
    found, converted = find("vae", "tokenizer")
    assert converted == ["vae"]
    assert not list((found / "transformer").glob("*.safetensors"))
    assert find("vae", "transformer") == (found, ["transformer"])
    assert find("vae", "transformer") == (found, [])
    # Other bytes in its place: nothing of the former ones is left.
    save_file({name: tensor + 1 for name, tensor in one_file(pipeline).items()}, file)
    os.utime(file, ns=(1, 1))
    assert find("vae") == (found, ["vae"])
    assert not list((found / "transformer").glob("*.safetensors"))
    torch.testing.assert_close(
        weights(found / "vae"), {n: t + 1 for n, t in weights(folder / "vae").items()}
    )


def test_another_transformer_beside_a_checkpoint(
    pipeline: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's own is not converted, and nothing is converted again."""
    changed = {name: tensor + 1 for name, tensor in weights(folder / "transformer").items()}
    save_file(changed, tmp_path / "tuned.safetensors")
    save_file(one_file(pipeline), tmp_path / "model.safetensors")
    for converted in (5, 0):
        found = find_base(
            str(tmp_path / "model.safetensors"),
            ALL,
            single_file_config=str(folder),
            transformer=tmp_path / "tuned.safetensors",
            cache_dir=tmp_path,
        )
        assert capsys.readouterr().err.count("converting") == converted
    torch.testing.assert_close(weights(found / "transformer"), changed, rtol=0, atol=0)
    assert_same(found, folder, WEIGHTS[1:])


def test_an_interruption_leaves_nothing_that_is_taken_for_whole(
    pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(one_file(pipeline), file)

    def find() -> Path:
        return find_base(str(file), ("vae",), single_file_config=str(folder), cache_dir=tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr("sd3.base.converted.move_into_place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            find()
    assert_same(find(), folder, ("vae",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"a.lora_A.weight": torch.ones(1)}, r"a LoRA, not a model\. Give it to --lora"),
        (lambda t: {"controlnet_blocks.0.weight": torch.ones(1)}, "a ControlNet, not a base model"),
        (
            lambda t: {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)},
            r"no transformer of SD3 in it: .* 1 tensors, model\.diffusion_model\.input_blocks",
        ),
        (
            lambda t: t | {"scaled_fp8": torch.ones(1)},
            "its 8 bit weights need scales that only",
        ),
        (
            lambda t: {n: x for n, x in t.items() if "joint_blocks.3.x_block" not in n},
            r"its transformer does not fit .*transformer/config\.json",
        ),
        (
            lambda t: {n: x for n, x in t.items() if "decoder.conv_in" not in n},
            "its vae lacks weights that its configuration asks for",
        ),
        (
            lambda t: {n: x for n, x in t.items() if "clip_g.transformer.text_proj" not in n},
            "its text_encoder_2 lacks weights that its configuration asks for",
        ),
        (
            lambda t: t | {"model.diffusion_model.pos_embed": torch.ones(1, 4, 64)},
            r"its transformer does not fit .*transformer/config\.json .*--single-file-config",
        ),
    ],
)
def test_what_cannot_be_a_base_is_refused(
    change: Any, message: str, pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_file(change(one_file(pipeline)), file)
    with pytest.raises(ConfigError, match=rf"^--pretrained-model-name-or-path {file}: {message}"):
        find_base(str(file), ALL, single_file_config=str(folder), cache_dir=tmp_path)


def test_options_that_do_not_fit_say_so(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    (tmp_path / "x.SAFETENSORS").write_bytes(b"")
    save_file({"joint_blocks.0.x": torch.ones(1)}, tmp_path / "e.safetensors")
    save_file(
        {n: t for n, t in one_file(pipeline).items() if "joint" not in n and "diffusion" not in n},
        tmp_path / "encoders.safetensors",
    )
    for name, options, message in (
        (folder, {"single_file_config": "x"}, "--single-file-config x: .* is no one-file check"),
        ("a.safetensors", {"single_file_config": folder}, r"'a\.safetensors': no such file"),
        (tmp_path / "e.safetensors", {"single_file_config": "x.safetensors"}, "--single-file-conf"),
        (folder, {"transformer": folder}, f"--transformer {folder}: a folder"),
        (folder, {"transformer": Path("a.safetensors")}, "--transformer 'a.*: no such file"),
        (folder, {"transformer": tmp_path / "x.SAFETENSORS"}, "must end with .safetensors, in sm"),
        (tmp_path / "cut.safetensors", {}, "cannot be read as safetensors"),
        (
            tmp_path / "encoders.safetensors",
            {"single_file_config": folder},
            "no transformer of SD3",
        ),
        (
            folder,
            {"transformer": tmp_path / "encoders.safetensors"},
            "--transformer .*: no transformer of SD3 in it",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            find_base(str(name), ("vae",), cache_dir=tmp_path, **options)


@pytest.mark.parametrize(
    ("num_layers", "dual", "published"),
    [(24, (), MEDIUM), (24, range(13), MEDIUM_35), (38, (), LARGE_35)],
)
def test_published_models_are_told_apart(
    num_layers: int, dual: Any, published: str, tmp_path: Path
) -> None:
    names = [f"joint_blocks.{number}.x_block.attn.qkv.weight" for number in range(num_layers)]
    names += [f"joint_blocks.{number}.x_block.attn2.qkv.weight" for number in dual]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert read_contents(tmp_path / "model.safetensors", "--x").published == published


def test_the_published_configurations_are_fetched_and_no_weights_that_the_file_has(
    hub: Hub, pipeline: Any, folder: Path, tmp_path: Path
) -> None:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    hub.add(f"models/{MEDIUM}", files)
    save_file(one_file(pipeline, text=False), tmp_path / "model.safetensors")
    found = find_base(str(tmp_path / "model.safetensors"), ALL, cache_dir=tmp_path / "downloads")
    assert_same(found, folder)
    assert hub.count(r"HEAD .*/text_encoder_3/model\.safetensors")
    assert not hub.count(r"HEAD .*/(vae|transformer)/.*safetensors")
    source = json.loads((found / "source.json").read_text())
    assert source["file"] == str(tmp_path / "model.safetensors")
