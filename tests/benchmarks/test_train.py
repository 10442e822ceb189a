"""The benchmarks of stage 2 in small: what they count is what arithmetic says."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import counts, flops, train_step
from benchmarks.bases import TRANSFORMERS, VAE, train_settings
from benchmarks.memory_chart import draw_memory
from benchmarks.presets import apply_preset
from benchmarks.random_weights import num_encoder_parameters, save_transformer
from benchmarks.reference import speed
from benchmarks.train_step import PLAIN, TINY, Row
from common.cards import card_file, card_names, gives_up, settings_with
from common.memory.need import Need, card_bytes
from tests.conftest import flags, run_python
from train.config import Checkpointing, TrainConfig
from train.memory.simulation import Sizes, simulate

# Tokens and width of SD3's embeddings.
CLIP, T5 = (77, 2048), (77, 4096)


def controlnet(transformer: dict[str, Any], num_layers: int = 12) -> dict[str, Any]:
    return transformer | {"num_layers": num_layers, "extra_conditioning_channels": 0}


@pytest.mark.slow
def test_a_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_transformer(tmp_path / "base", TINY)
    settings = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    found = train_step.measure(Row("a row", 256, settings), tmp_path, TINY, 1e-3, 0.1)
    assert found["samples"] == 4
    assert found["samples_per_second"] == pytest.approx(4 / found["seconds_per_step"])
    assert found["of_matrix_rate"] == pytest.approx(found["tflops"] / 1e-3)
    # Batches that are read ahead are in host memory, which on a CPU is the same.
    assert sum(found["estimated_bytes"].values()) == pytest.approx(
        found["measured_bytes"], rel=0.04
    )
    assert "a row" in train_step.format_row(found)
    # A miniature of 4 blocks has no ear for 6.
    found = train_step.measure(
        Row("too many", 256, {"num_controlnet_layers": 6}), tmp_path, TINY, 1e-3
    )
    assert "1 to 2" in found["failed"]
    assert found["failed"] in train_step.format_row(found)


@pytest.mark.slow
def test_operations_of_a_step() -> None:
    sizes = Sizes(TINY, controlnet(TINY, 2), None, (16, 16), (3, 48), (5, 96), False)
    config = TrainConfig(pretrained_model_name_or_path="x", cache=("y",), **PLAIN)
    found = flops.count_step_flops(config, sizes)
    assert flops.count_step_flops(replace(config, checkpointing="full"), sizes) == found
    assert (
        flops.count_step_flops(replace(config, gradient_accumulation_steps=3), sizes) == 3 * found
    )
    # Blocks of width w: queries, keys, values, output and a feedforward of 8 w^2, both for the
    # picture's 64 tokens and the text's 8; attention over all of them.
    width, tokens = 64, 64 + 8
    products = 2 * tokens * (4 + 8) * width**2
    attention = 4 * tokens**2 * width
    forward = (4 + 2) * (products + attention)
    # The frozen base's gradients are of its inputs, the ControlNet's also of its weights; nothing
    # reaches back into the base's first block, after which the ControlNet's first residual comes.
    blocks = forward + (3 + 2) * (products + 2 * attention) + 2 * products
    # Modulation, embeddings and the ends are what is left.
    assert blocks < found < 1.1 * blocks


@pytest.mark.slow
def test_what_a_step_executes() -> None:
    """The miniature of `test_operations_of_a_step`, of 2 + 4 blocks of which 5 have gradients."""
    sizes = Sizes(TINY, controlnet(TINY, 2), None, (16, 16), (3, 48), (5, 96), False)
    config = TrainConfig(pretrained_model_name_or_path="x", cache=("y",), **PLAIN)
    width, picture, text = 64, 64, 8
    executed = {
        level: counts.count_step(replace(config, checkpointing=level), sizes)
        for level in get_args(Checkpointing)
    }
    flops_of = {level: found.flops for level, (_, found) in executed.items()}
    # FlashAttention's backward pass computes the product of queries and keys once more.
    product = 2 * (picture + text) ** 2 * width
    assert flops_of["none"] == counts.needed_flops(config, sizes) + 5 * product
    # Attention has two; the feed-forward's second product is of all pictures, and of all texts but
    # that of the base's last block, which has none.
    second = 2 * 4 * width**2
    assert flops_of["full"] - flops_of["selective"] == (
        5 * 2 * product + 5 * picture * second + 4 * text * second
    )
    assert flops_of["none"] < flops_of["controlnet"] < flops_of["selective"]
    kept = [found.kept_bytes for _, found in executed.values()]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    fullest, found = executed["none"]
    assert fullest == simulate(config, sizes).step
    # A step of several batches of several samples.
    more = replace(config, train_batch_size=2, gradient_accumulation_steps=3)
    _, larger = counts.count_step(more, sizes)
    assert larger.flops == found.flops
    assert larger.kernels > 3 * found.kernels  # gradients are added up


def test_operators_are_counted_by_hand() -> None:
    with FakeTensorMode():
        one = torch.empty(10, 20)
        with counts.Operators() as found:
            half = one.t().to(torch.bfloat16)  # reads 4 bytes a number and writes 2
            torch.cat([half, half]).view(-1)  # reads and writes 2, of twice as many
            half @ torch.empty(10, 30, dtype=torch.bfloat16)
    assert found.copied_bytes == 200 * (4 + 2) + 400 * (2 + 2)
    assert found.flops == 2 * 20 * 10 * 30
    assert found.kernels == 3


@pytest.mark.slow
def test_the_reference_encodes_at_each_step() -> None:
    vae = VAE | {"block_out_channels": [8] * 4, "norm_num_groups": 2, "layers_per_block": 1}
    sizes = Sizes(TINY, controlnet(TINY, 2), vae, (16, 16), (3, 48), (5, 96), False)
    config = TrainConfig(
        pretrained_model_name_or_path="x", cache=("y",), checkpointing="controlnet", **PLAIN
    )
    with FakeTensorMode(), FlopCounterMode(display=False) as encoding, torch.no_grad():
        AutoencoderKL.from_config(vae).encode(torch.empty(2, 3, 128, 128))
    # Its attention is over 16 x 16 places, one head of width 8.
    attention = 2 * 4 * (16 * 16) ** 2 * 8
    _, ours = counts.count_step(config, sizes)
    reference = counts.count_reference_step(sizes)
    assert reference.flops - ours.flops == encoding.get_total_flops() + attention


def test_the_counts_of_the_pages_are_those_of_the_results() -> None:
    page = Path("docs/performance.md").read_text()
    for base in TRANSFORMERS:
        results = Path(f"benchmarks/results/train_step_{base}_predicted.json")
        assert counts.table(json.loads(results.read_text())["rows"]) in page


def test_operations_of_attention() -> None:
    query, key = torch.Size([1, 2, 3, 4]), torch.Size([1, 2, 5, 4])
    assert flops.attention_flops(query, key, key) == 2 * (2 * 3 * 5 * 4 + 2 * 3 * 5 * 4)
    assert flops.attention_backward_flops(query, query, key, key) == 960


def test_the_memory_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"name": "plain, batch 1", "px": 64, "estimated_bytes": {"ControlNet": 10**9}},
        {
            "name": "card of 8 GB",
            "px": 64,
            "estimated_bytes": {"frozen base": 2 * 10**9},
            "measured_bytes": 2.1e9,
        },
        {"name": "card of 80 GB", "px": 64, "failed": "out of memory"},
    ]
    draw_memory(rows, tmp_path / "memory.png", "a base")
    with Image.open(tmp_path / "memory.png") as image:
        assert image.width > 500


def test_the_encoders_weigh_what_the_published_ones_do() -> None:
    # CLIP-L 123.65 M, CLIP-G 694.66 M, T5-XXL 4,762.31 M, VAE 83.82 M.
    assert num_encoder_parameters() == pytest.approx(5664.4e6, rel=0.001)


@pytest.mark.parametrize("base", sorted(TRANSFORMERS))
def test_every_card_goes_with_every_base(base: str) -> None:
    run = train_settings(base)
    for card in card_names():
        config = TrainConfig(
            **run | settings_with(card, "train", TrainConfig) | {"cache": ("cache",)}
        )
        samples = config.train_batch_size * config.gradient_accumulation_steps
        assert samples == (1 if config.fused_backward_pass else 4)
        text = card_file(card).read_text()
        assert f"CARD={card}" in text
        assert f"# For a card of {card.removesuffix('gb')} GB" in text
        precise = not (config.bf16_weights or config.optimizer != "adamw" or config.quantize_base)
        cost = gives_up(card, "train")
        assert ("precision" in cost) is not precise
        assert ("speed" in cost) is (config.checkpointing != "none")
        assert ("host memory" in cost) is bool(config.offload_base or config.offload_optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("card", card_names())
def test_every_preset_fits_its_card(card: str) -> None:
    size = card_bytes(int(card.removesuffix("gb")))
    for base in ("sd3-medium", "sd35-medium"):
        run = train_settings(base)
        changes = settings_with(card, "train", TrainConfig)
        config = TrainConfig(**run | changes | {"cache": ("cache",)})
        transformer = TRANSFORMERS[base]
        vae = VAE if config.validation_decode == "vae" else None
        sizes = Sizes(transformer, controlnet(transformer), vae, (128, 128), CLIP, T5, True)
        assert Need(simulate(config, sizes).peak).fits(size)


def test_presets_change_no_samples(tmp_path: Path) -> None:
    base = TrainConfig(
        pretrained_model_name_or_path="x", cache=("y",), train_batch_size=8, output_dir=tmp_path
    )
    for card in card_names():
        config = apply_preset(base, card)
        assert config.train_batch_size * config.gradient_accumulation_steps == 8


def test_ratios_are_drawn(tmp_path: Path) -> None:
    figures: dict[str, dict[str, float | None]] = {
        "reference": {"steps a second": 2.0, "most device memory, GB": None},
        "ours": {"steps a second": 3.0, "most device memory, GB": None},
    }
    speed.draw_ratios(figures, tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert image.width > 500


def test_figures_of_two_runs() -> None:
    runs = [
        {"start": 100.0, "times": [110.0 + 2 * step for step in range(9)], "host_bytes": 1},
        {"start": 200.0, "times": [205.0 + 2 * step for step in range(9)], "host_bytes": 3e9},
    ]
    for one in runs:
        one["device_bytes"] = None
    found = speed.summarize_runs(runs, before=30.0, cached=4_000_000)
    assert found == {
        "seconds to the first step, first start": 40.0,
        "seconds to the first step, second start": 5.0,
        "steps a second": 0.5,
        "most host memory, GB": 3.0,
        "most device memory, GB": None,
        "cached on disk, MB": 4.0,
    }


@pytest.mark.slow
def test_a_run_is_watched(train_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(train_config, logging_steps=1, report_to="tensorboard", validation_steps=0)
    noted = tmp_path / "figures.json"
    done = run_python("-m", "benchmarks.reference.watch", noted, "train", *flags(config))
    assert done.returncode == 0, done.stderr
    found = json.loads(noted.read_text())
    assert len(found["times"]) == config.max_train_steps
    assert found["times"] == sorted(found["times"])
    assert found["host_bytes"] > 10**8
    assert (config.output_dir / "config.json").is_file()
