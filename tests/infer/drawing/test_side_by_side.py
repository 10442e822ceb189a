"""Several ControlNets, seeds and sources of pairs, each picture beside the stock pipeline's."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from PIL import Image

from common.atomic_files import cannot_write
from common.errors import ConfigError, RunError
from infer.config import GenerateConfig
from infer.convention import Convention
from infer.drawing import metadata
from infer.drawing.generate import draw, generate
from sd3.contact_sheet import save_png
from sd3.images import fit
from sd3.pretrained import DATA_KEY
from sd3.quantized import RowLinear
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, Outcome, awaken, flags


@pytest.fixture(scope="module")
def second(controlnet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another ControlNet for the same base."""
    folder = tmp_path_factory.mktemp("second") / "other"
    shutil.copytree(controlnet, folder)
    network = SD3ControlNetModel.from_pretrained(folder)
    awaken(network, seed=1)
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path, controlnet: Path, circles: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS,
        image=(circles / "source" / "0.png", circles / "source" / "1.png"),
        seed=(7,),
        num_inference_steps=2,
        device="cpu",
    )


def picture(config: GenerateConfig, name: str) -> np.ndarray:
    return np.array(Image.open(config.output_dir / f"{name}.png"))


def fitted(path: Path) -> Image.Image:
    return fit(Image.open(path).convert("RGB"), RESOLUTION_PX)


def stock(config: GenerateConfig, *names: str, **arguments: Any) -> list[np.ndarray]:
    """What the stock pipeline draws with these ControlNets, nothing of ours in it."""
    nets = [SD3ControlNetModel.from_pretrained(name) for name in names]
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        controlnet=nets[0] if len(nets) == 1 else SD3MultiControlNetModel(nets),
    )
    if (shift := arguments.pop("shift", None)) is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, shift=shift
        )
    if (seed := arguments.pop("seed", None)) is not None:
        arguments["generator"] = torch.manual_seed(seed)
    usual = {
        "height": RESOLUTION_PX,
        "width": RESOLUTION_PX,
        "num_inference_steps": 2,
        "max_sequence_length": TOKENS,
    }
    return [np.array(image) for image in pipeline(**usual | arguments).images]


def test_a_batch_is_the_stock_pipelines(config: GenerateConfig) -> None:
    generate(replace(config, batch_size=2, negative_prompt="grey"))
    torch.manual_seed(7)
    expected = stock(
        config,
        *config.controlnet,
        prompt=list(PROMPTS),
        negative_prompt=["grey", "grey"],
        control_image=[fitted(path) for path in config.image],
        generator=[torch.Generator().manual_seed(7) for _ in range(2)],
    )
    for number, one in enumerate(expected):
        assert np.array_equal(picture(config, f"00{number}"), one)


def test_columns_and_seeds(config: GenerateConfig, second: Path) -> None:
    both = replace(config, controlnet=(*config.controlnet, str(second)), seed=(7, 8))
    generate(both)
    titles = [Path(config.controlnet[0]).name, "other"]
    found = {path.name for path in config.output_dir.glob("00*.png")}
    assert found == {
        f"00{pair}-seed{seed}-{title}.png" for pair in (0, 1) for seed in (7, 8) for title in titles
    }
    (expected,) = stock(
        config,
        str(second),
        prompt=PROMPTS[1],
        control_image=[fitted(config.image[1])],
        seed=8,
    )
    assert np.array_equal(picture(config, "001-seed8-other"), expected)
    assert (config.output_dir / "contact_sheet.png").is_file()


def test_two_controlnets_together(config: GenerateConfig, second: Path) -> None:
    both = replace(
        config,
        controlnet=(*config.controlnet, str(second)),
        combine=True,
        prompt=PROMPTS[:1],
        controlnet_conditioning_scale=(0.5,),
        shift=2.0,
        control_guidance_end=(0.5,),
    )
    generate(both)
    (expected,) = stock(
        config,
        *both.controlnet,
        prompt=[PROMPTS[0]],
        control_image=[[fitted(path)] for path in config.image],
        controlnet_conditioning_scale=[0.5, 0.5],
        control_guidance_end=0.5,
        shift=2.0,
        seed=7,
    )
    assert np.array_equal(picture(config, "000"), expected)
    other = json.loads((second / "config.json").read_text())
    other[DATA_KEY]["max_sequence_length"] = 5
    changed = config.output_dir / "changed"
    shutil.copytree(second, changed)
    (changed / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"otherwise than .*max_sequence_length 5, not"):
        generate(replace(both, controlnet=(*config.controlnet, str(changed))))


def test_each_controlnet_gets_its_own_image(config: GenerateConfig, second: Path) -> None:
    both = replace(config, controlnet=(*config.controlnet, str(second)), combine=True)
    # Two prompts and two images: an image for each ControlNet, both for every prompt.
    generate(both)
    for number in (0, 1):
        (expected,) = stock(
            config,
            *both.controlnet,
            prompt=[PROMPTS[number]],
            control_image=[[fitted(path)] for path in config.image],
            controlnet_conditioning_scale=[1.0, 1.0],
            seed=7,
        )
        assert np.array_equal(picture(config, f"00{number}"), expected)
    with pytest.raises(ConfigError, match="2 --prompt and 3 --image for 2 ControlNets"):
        generate(replace(both, image=(*config.image, config.image[0])))


def test_prompts_of_the_cache_need_no_text_encoder(
    config: GenerateConfig, cache: Path, tmp_path: Path
) -> None:
    generate(config)
    bare = tmp_path / "bare"
    for name in ("transformer", "scheduler", "vae"):
        shutil.copytree(Path(config.pretrained_model_name_or_path) / name, bare / name)
    shutil.copy(Path(config.pretrained_model_name_or_path) / "model_index.json", bare)
    cached = replace(
        config,
        pretrained_model_name_or_path=str(bare),
        output_dir=tmp_path / "cached",
        cache=str(cache),
    )
    generate(cached)
    for name in ("000", "001"):
        assert np.array_equal(picture(cached, name), picture(config, name))
    unknown = replace(cached, prompt=("of no row",), output_dir=tmp_path / "unknown")
    with pytest.raises(ConfigError, match="no text_encoder/, "):
        generate(unknown)
    with pytest.raises(ConfigError, match=rf"{TOKENS} T5 tokens, and the ControlNet wants 9"):
        generate(replace(cached, max_sequence_length=9))


def test_the_cache_alone_has_its_validation_pairs_drawn(
    config: GenerateConfig, cache: Path
) -> None:
    own = replace(config, cache=str(cache), prompt=(), image=())
    generate(own)
    generate(replace(config, output_dir=config.output_dir / "given"))
    for name in ("000", "001"):
        assert np.array_equal(
            picture(own, name), picture(replace(config, output_dir=own.output_dir / "given"), name)
        )


@torch.no_grad()
def test_the_pipelines_conditioning_latent_is_the_caches(
    config: GenerateConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []
    forward = SD3ControlNetModel.forward

    def watched(self: Any, *arguments: Any, **more: Any) -> Any:
        given.append(more["controlnet_cond"])
        return forward(self, *arguments, **more)

    monkeypatch.setattr(SD3ControlNetModel, "forward", watched)
    # The pipeline samples the posterior; the cache holds its mean.
    posterior = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    monkeypatch.setattr(f"{posterior}.sample", lambda self, generator=None: self.mean)
    generate(replace(config, prompt=(), image=(), cache=str(cache), num_inference_steps=1))
    opened = Cache(cache)
    spec = opened.conditioning_spec
    for number in range(2):
        cached = opened.validation.tensors(0, number)["conditioning_latent"]
        expected = (cached - spec.shift_factor) * spec.scaling_factor
        # Once without the prompt and once with it.
        for latent in given[number]:
            torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)


def test_a_picture_says_how_it_was_drawn_and_is_drawn_again(
    config: GenerateConfig, command: Callable[..., Outcome], second: Path, tmp_path: Path
) -> None:
    both = replace(
        config,
        controlnet=(*config.controlnet, str(second)),
        seed=(7, 8),
        guidance_scale=3.5,
        negative_prompt="grey — not blue",
    )
    generate(both)
    file = config.output_dir / "001-seed8-other.png"
    shown = json.loads(command("infer", "show", file).output)
    settings = shown["settings"]
    assert settings["prompt"] == [PROMPTS[1]]
    assert settings["seed"] == [8]
    assert settings["negative_prompt"] == "grey — not blue"
    assert settings["controlnet"] == [str(second)]
    assert (settings["width"], settings["height"]) == (RESOLUTION_PX, RESOLUTION_PX)
    again = tmp_path / "again"
    done = command(*("infer", "generate", "--like", file, "--output-dir", again, "--device", "cpu"))
    assert done.exit_code == 0, done.output
    assert np.array_equal(np.array(Image.open(again / "000.png")), np.array(Image.open(file)))
    changed = command(
        *("infer", "generate", "--like", file, "--output-dir", tmp_path / "changed"),
        *("--device", "cpu", "--seed", "9"),
    )
    assert changed.exit_code == 0
    assert metadata.read(tmp_path / "changed" / "000.png")["settings"]["seed"] == [9]


def test_what_is_drawn_already_is_left(
    config: GenerateConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(config)
    (config.output_dir / "001.png").unlink()
    before = (config.output_dir / "000.png").stat().st_mtime_ns
    capsys.readouterr()
    generate(config)
    assert "1 of 2 pictures are there already" in capsys.readouterr().out
    assert (config.output_dir / "000.png").stat().st_mtime_ns == before
    with monkeypatch.context() as patched:
        patched.setattr("infer.drawing.generate.LoadedBase", None)
        generate(config)
    capsys.readouterr()
    generate(replace(config, guidance_scale=2.0))
    assert "2 that were drawn otherwise are replaced" in capsys.readouterr().out
    assert (config.output_dir / "000.png").stat().st_mtime_ns > before


def test_what_was_drawn_together_is_drawn_together_again(config: GenerateConfig) -> None:
    three = replace(
        config, prompt=(*PROMPTS, PROMPTS[0]), image=(*config.image, config.image[0]), batch_size=2
    )
    generate(three)
    first = [picture(config, f"00{number}") for number in range(3)]
    for number in (1, 2):
        (config.output_dir / f"00{number}.png").unlink()
    before = (config.output_dir / "000.png").stat().st_mtime_ns
    generate(three)
    assert (config.output_dir / "000.png").stat().st_mtime_ns == before
    for number in range(3):
        assert np.array_equal(picture(config, f"00{number}"), first[number])
    drawn = [metadata.read(config.output_dir / f"00{number}.png")["drawn"] for number in range(3)]
    assert drawn == [{"device": "cpu", "batch": place} for place in ([0, 2], [1, 2], [0, 1])]


def test_a_changed_configuration_draws_anew(config: GenerateConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(config.controlnet[0], folder)
    own = replace(config, controlnet=(str(folder),))
    generate(own)
    first = picture(own, "000")
    values = json.loads((folder / "config.json").read_text())
    values[DATA_KEY]["conditioning_range"] = "0_1"
    (folder / "config.json").write_text(json.dumps(values))
    generate(own)
    assert not np.array_equal(picture(own, "000"), first)


def test_like_wins_over_configurations_and_tells_of_changes(
    config: GenerateConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(config.controlnet[0], folder)
    generate(replace(config, controlnet=(str(folder),), batch_size=2))
    toml = tmp_path / "run.toml"
    toml.write_text('[infer]\nprompt = ["another"]\nshift = 9.0\nresolution = 32\nseed = [5]\n')
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    file, again = config.output_dir / "001.png", tmp_path / "again"
    for order in (("--like", file, "--config", toml), ("--config", toml, "--like", file)):
        outcome = command(
            *("infer", "generate", *order, "--output-dir", again, "--device", "cpu"),
        )
        assert outcome.exit_code == 0, outcome.output
        settings = metadata.read(again / "000.png")["settings"]
        assert settings == metadata.read(file)["settings"]
        assert f"{folder} has changed since" in outcome.output
        assert "was drawn in a batch" in outcome.output
        shutil.rmtree(again)


def test_other_weights_draw_anew(config: GenerateConfig, second: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(config.controlnet[0], folder)
    own = replace(config, controlnet=(str(folder),))
    generate(own)
    first = picture(own, "000")
    shutil.copytree(second, folder, dirs_exist_ok=True)
    generate(own)
    assert not np.array_equal(picture(own, "000"), first)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), r"CUDA out of memory\. "),
        (RuntimeError("FIND was unable to find an engine to"), "out of memory: FIND was unable"),
    ],
)
def test_finished_pictures_survive_a_full_memory(
    error: Exception, message: str, config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What would help is counted in tests/infer/memory/test_estimate.py.
    monkeypatch.setattr("infer.pipeline.remedies", lambda _: [("--quantize-base int8", 1)])
    count = iter(range(2))

    def full(*arguments: Any) -> Any:
        if next(count):
            raise error
        return draw(*arguments)

    monkeypatch.setattr("infer.drawing.generate.draw", full)
    with pytest.raises(RunError, match=f"(?s){message}.*--quantize-base"):
        generate(config)
    assert [path.name for path in config.output_dir.glob("*.png")] == ["000.png"]


def test_finished_pictures_survive_a_full_disk(
    config: GenerateConfig, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = iter(range(2))

    def full(path: Path, *arguments: Any) -> None:
        if next(saved):
            raise cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 0)
        save_png(path, *arguments)

    monkeypatch.setattr("infer.drawing.generate.save_png", full)
    outcome = command("infer", "generate", *flags(config))
    assert outcome.exit_code == 2
    assert f"{config.output_dir / '001.png'}: " in outcome.output
    assert "No space left on device" in outcome.output
    assert [path.name for path in config.output_dir.glob("*.png")] == ["000.png"]


def test_zero_pooled_embeddings_as_instantx_trains(config: GenerateConfig, tmp_path: Path) -> None:
    folder = tmp_path / "zeros"
    shutil.copytree(config.controlnet[0], folder)
    values = json.loads((folder / "config.json").read_text())
    values["force_zeros_for_pooled_projection"] = True
    (folder / "config.json").write_text(json.dumps(values))
    own = replace(config, controlnet=(str(folder),), prompt=PROMPTS[:1], image=config.image[:1])
    generate(own)
    arguments = {"prompt": PROMPTS[0], "control_image": [fitted(config.image[0])], "seed": 7}
    (expected,) = stock(config, str(folder), **arguments)
    (other,) = stock(config, *config.controlnet, **arguments)
    assert np.array_equal(picture(own, "000"), expected)
    assert not np.array_equal(expected, other)


PAIRS = {
    "pairs.toml": '[[pair]]\nprompt = "a"\nimage = "0.png"\n'
    '[[pair]]\nprompt = "b"\nimage = "1.png"\nseed = 3\nnegative_prompt = "c"\n',
    "pairs.jsonl": '{"prompt": "a", "image": "0.png"}\n\n'
    '{"prompt": "b", "image": ["1.png"], "seed": 3, "negative_prompt": "c"}\n',
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_a_file(name: str, config: GenerateConfig, circles: Path, tmp_path: Path) -> None:
    shutil.copytree(circles / "source", tmp_path / "pairs")
    file = tmp_path / "pairs" / name
    file.write_text(PAIRS[name])
    generate(replace(config, prompt=(), image=(), pairs=file))
    settings = [
        metadata.read(config.output_dir / f"00{number}.png")["settings"] for number in (0, 1)
    ]
    assert [one["prompt"] for one in settings] == [["a"], ["b"]]
    assert [one["seed"] for one in settings] == [[7], [3]]
    assert [one["negative_prompt"] for one in settings] == ["", "c"]
    assert settings[1]["image"] == [str(tmp_path / "pairs" / "1.png")]


def test_pairs_of_a_folder(config: GenerateConfig, circles: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    shutil.copy(circles / "source" / "0.png", folder / "b.png")
    shutil.copy(circles / "source" / "1.png", folder / "a.png")
    (folder / "a.txt").write_text("first\n")
    own = replace(config, prompt=(), image=(), pairs=folder)
    with pytest.raises(ConfigError, match=r"b\.png needs its prompt in b\.txt"):
        generate(own)
    (folder / "b.txt").write_text("second")
    generate(own)
    assert metadata.read(config.output_dir / "000.png")["settings"]["prompt"] == ["first"]
    assert metadata.read(config.output_dir / "001.png")["settings"]["prompt"] == ["second"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}', r"line 1: image: expected a path, or a list of them, found None"),
        ('{"prompt": 3, "image": "0.png"}', r"line 1: prompt: expected str, found 3"),
        ('{"prompt": "a", "image": "0.png", "sed": 1}', r"unknown key 'sed'\. Did you mean 'seed'"),
        ('{"prompt": "a", "image": "none.png"}', r"none\.png: No such file"),
        ("[1]", r"line 1: expected prompt and image, found \[1\]"),
        ("{", r"neither TOML nor JSON lines"),
        ("", r"nothing in it to draw"),
    ],
)
def test_bad_pairs_are_named(
    config: GenerateConfig, tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        generate(replace(config, prompt=(), image=(), pairs=file))
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet": ()}, "--controlnet: give at least one"),
        ({"combine": True}, "--combine: give --controlnet twice"),
        ({"pairs": Path("x")}, "--pairs: give it, or"),
        ({"prompt": (), "image": ()}, "nothing to draw"),
        ({"height": 64}, "--height and --width: give both"),
        ({"height": 64, "width": 60}, "--width 60: must be divisible by 16"),
        ({"height": 64, "width": 64, "resolution": 64}, "--resolution: give it, or"),
        (
            {"control_guidance_start": (0.5,), "control_guidance_end": (0.5,)},
            "the start before the end",
        ),
        ({"shift": 0.0}, "--shift 0: must be above 0"),
        ({"batch_size": 0}, "--batch-size 0: at least 1"),
        ({"seed": ()}, "--seed: give at least one"),
        ({"offload": "groups", "compile": True}, "--offload groups: does not go"),
    ],
)
def test_settings_that_do_not_go_together(
    config: GenerateConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **changes)


def test_nothing_is_offloaded_from_a_cpu(config: GenerateConfig) -> None:
    with pytest.raises(ConfigError, match="--offload model: the CPU is where"):
        generate(replace(config, offload="model"))


def test_the_nearest_bucket_is_taken(config: GenerateConfig, tmp_path: Path) -> None:
    convention = Convention(((64, 96), (64, 64), (96, 64)), TOKENS, "-1_1")
    sizes = [
        convention.picture_size(Image.new("L", size)) for size in ((10, 20), (30, 31), (20, 10))
    ]
    assert sizes == [(64, 96), (64, 64), (96, 64)]
    folder = tmp_path / "bucketed"
    shutil.copytree(config.controlnet[0], folder)
    values = json.loads((folder / "config.json").read_text())
    values[DATA_KEY]["buckets"] = [[64, 64], [64, 96]]
    (folder / "config.json").write_text(json.dumps(values))
    wide = tmp_path / "wide.png"
    Image.open(config.image[0]).convert("RGB").resize((192, 128)).save(wide)
    own = replace(config, controlnet=(str(folder),), prompt=PROMPTS[:1], image=(wide,))
    generate(own)
    assert picture(own, "000").shape == (64, 96, 3)
    (expected,) = stock(
        config,
        str(folder),
        prompt=PROMPTS[0],
        control_image=[fit(Image.open(wide), (96, 64))],
        width=96,
        seed=7,
    )
    assert np.array_equal(picture(own, "000"), expected)


def test_a_controlnet_of_diffusers_script_is_driven_as_it_was_trained(
    config: GenerateConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "script"
    shutil.copytree(config.controlnet[0], folder)
    values = json.loads((folder / "config.json").read_text())
    del values[DATA_KEY]
    values["force_zeros_for_pooled_projection"] = True
    (folder / "config.json").write_text(json.dumps(values))
    own = replace(
        config,
        controlnet=(str(folder),),
        prompt=PROMPTS[:1],
        image=config.image[:1],
        resolution=RESOLUTION_PX,
        convention="train_controlnet_sd3",
    )
    generate(own)
    unit = torch.from_numpy(np.array(fitted(config.image[0]))).permute(2, 0, 1)[None] / 255
    (expected,) = stock(
        config,
        *config.controlnet,  # whose configuration has the real pooled embedding
        prompt=PROMPTS[0],
        control_image=unit,
        max_sequence_length=77,
        seed=7,
    )
    assert np.array_equal(picture(own, "000"), expected)


def test_a_controlnet_that_reads_no_text(config: GenerateConfig, tmp_path: Path) -> None:
    """Stability's for SD3.5-large: blocks of the picture alone, no positions of their own."""
    values = json.loads((Path(config.controlnet[0]) / "config.json").read_text())
    changes = {"joint_attention_dim": None, "use_pos_embed": False, "dual_attention_layers": ()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SD3ControlNetModel.from_config(
            {key: value for key, value in values.items() if not key.startswith("_")} | changes
        )
        awaken(network)
    network.save_pretrained(tmp_path / "8b")
    own = replace(
        config,
        controlnet=(str(tmp_path / "8b"),),
        prompt=PROMPTS[:1],
        image=config.image[:1],
        resolution=RESOLUTION_PX,
        max_sequence_length=TOKENS,
    )
    generate(own)
    (expected,) = stock(
        config,
        str(tmp_path / "8b"),
        prompt=PROMPTS[0],
        control_image=[fitted(config.image[0])],
        seed=7,
    )
    assert np.array_equal(picture(own, "000"), expected)


def test_a_transformer_in_8_bit_draws_nearly_the_same(
    config: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(config)
    call = StableDiffusion3ControlNetPipeline.__call__
    seen: list[Any] = []

    def watched(self: Any, *arguments: Any, **more: Any) -> Any:
        layer = self.transformer.transformer_blocks[0].ff.net[2]
        seen.append((type(layer), self.vae.use_tiling))
        return call(self, *arguments, **more)

    monkeypatch.setattr(StableDiffusion3ControlNetPipeline, "__call__", watched)
    other = replace(config, quantize_base="int8", output_dir=tmp_path / "int8", vae_tiling=True)
    generate(other)
    assert seen == [(RowLinear, True)] * 2
    difference = np.abs(picture(other, "000").astype(int) - picture(config, "000"))
    assert difference.mean() < 1


@pytest.mark.parametrize("spoiled", ["plain", "damaged"])
def test_files_that_say_nothing(
    spoiled: str, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "picture.png"
    about = {"plain": None, "damaged": metadata.png_info("{")}[spoiled]
    Image.new("RGB", (8, 8)).save(file, pnginfo=about)
    outcome = command("infer", "show", file)
    assert outcome.exit_code == 2
    expected = {"plain": "it says no settings", "damaged": "its settings are damaged"}
    assert expected[spoiled] in outcome.output
    missing = command("infer", "generate", "--like", tmp_path / "none.png", "--output-dir", "x")
    assert missing.exit_code == 2
    assert "No such file" in missing.output


def test_the_command_line_takes_what_was_given(
    config: GenerateConfig, command: Callable[..., Outcome]
) -> None:
    outcome = command("infer", "generate", *flags(replace(config, prompt=PROMPTS[:1])))
    assert outcome.exit_code == 0, outcome.output
    assert str(config.output_dir / "001.png") in outcome.output
