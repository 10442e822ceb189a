"""Stage 3 on the second of two GPUs, with its models placed in every way."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel
from PIL import Image

from common.device import pick_device
from infer.config import GenerateConfig, ServeConfig
from infer.draw_service import DrawService
from infer.drawing.generate import generate
from shards.preview import preview
from shards.reading.cache import Cache
from shards.remote.streaming import LOCAL_CACHE_GB, open_files
from tests.conftest import PROMPTS, awaken
from tests.devices import stand_in


@pytest.fixture(autouse=True)
def on_the_second() -> Iterator[None]:
    """Let nothing happen on cuda:0."""
    with stand_in.only("cuda:1"):
        yield


@pytest.fixture
def config(base: Path, controlnet: Path, circles: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "images",
        prompt=PROMPTS[:1],
        image=(circles / "source" / "0.png",),
        seed=(7,),
        num_inference_steps=2,
        device="cuda:1",
        offload="none",
    )


def picture(config: GenerateConfig, name: str) -> np.ndarray[Any, Any]:
    """Draw the picture, or the first of several, in a folder of its own."""
    folder = config.output_dir / name
    generate(replace(config, output_dir=folder))
    return np.array(Image.open(min(folder.glob("000*.png"))))


@pytest.mark.parametrize("placement", ["auto", "model", "groups"])
def test_a_placement_changes_no_pixel(placement: Any, config: GenerateConfig) -> None:
    on_device = picture(config, "none")
    assert np.array_equal(on_device, picture(replace(config, offload=placement), placement))


@pytest.mark.parametrize("placement", ["none", "model", "groups"])
def test_the_second_of_two_controlnets_draws_what_it_draws_alone(
    placement: Any, config: GenerateConfig, tmp_path: Path
) -> None:
    """Whatever the first has left on the device."""
    network = SD3ControlNetModel.from_pretrained(config.controlnet[0])
    awaken(network, seed=1)
    network.save_pretrained(tmp_path / "second")
    config = replace(config, offload=placement)
    alone = picture(replace(config, controlnet=(str(tmp_path / "second"),)), "alone")
    both = replace(
        config,
        controlnet=(*config.controlnet, str(tmp_path / "second")),
        output_dir=tmp_path / "both",
    )
    generate(both)
    assert np.array_equal(np.array(Image.open(tmp_path / "both" / "000-second.png")), alone)
    assert not np.array_equal(picture(config, "first"), alone)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantized_base(quantization: Any, config: GenerateConfig) -> None:
    quantized = replace(config, quantize_base=quantization)
    on_device = picture(quantized, "none")
    assert on_device.std() > 0
    for placement in ("model", "groups"):
        drawn = picture(replace(quantized, offload=placement), placement)
        assert np.array_equal(drawn, on_device)


def test_prompts_from_the_cache_and_two_seeds_at_once(config: GenerateConfig, cache: Path) -> None:
    batched = replace(config, cache=str(cache), seed=(7, 8), batch_size=2, offload="model")
    assert picture(batched, "batched").std() > 0


def test_latents_are_decoded_on_the_chosen_device(base: Path, cache: Path) -> None:
    opened = Cache(open_files(str(cache), None, LOCAL_CACHE_GB), "conditioning")
    sheets = [
        preview(opened, str(base), num_samples=1, seed=0, device=device)
        for device in ("cuda:1", "cpu")
    ]
    on_gpu, on_cpu = (np.asarray(sheet).astype(int) for sheet in sheets)
    assert abs(on_gpu - on_cpu).max() <= 1  # rounded to 8 bit


def test_a_thread_of_the_page_draws_on_the_chosen_device(
    config: GenerateConfig, tmp_path: Path
) -> None:
    service = DrawService(
        ServeConfig(
            pretrained_model_name_or_path=config.pretrained_model_name_or_path,
            controlnet=config.controlnet,
            output_dir=tmp_path / "page",
            device="cuda:1",
        )
    )
    found: list[Any] = []

    def draw() -> None:
        path, _ = service.draw(
            Image.open(config.image[0]).convert("RGB"),
            PROMPTS[0],
            "",
            next(iter(service.controlnets)),
            seed=7,
            num_inference_steps=2,
            guidance_scale=7.0,
            controlnet_conditioning_scale=1.0,
        )
        found.extend([path, torch.cuda.current_device()])

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert found[1] == pick_device("cuda:1").index
    assert Image.open(found[0]).size == (64, 64)
