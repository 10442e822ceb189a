"""Training the miniature base: a start that works, states that resume, a base that loads."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import demo.base_model.quality
import demo.base_model.train_base
import demo.base_model.train_flow
import demo.base_model.train_vae
from demo.base_model.shapes import (
    HELD_OUT_PAIRS,
    NAMES,
    PALETTE,
    TRAINED_PAIRS,
    caption,
    load_shapes,
    paint_discs,
    paint_outlines,
)
from demo.base_model.vae import ANCHOR, CONSTANTS, build_vae, freeze_constant_channels
from demo.colors import COLORS, is_held_out
from sd3.images import fit
from sd3.pixels import to_pixels, to_uint8
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
MINIATURE = REPOSITORY / "demo" / "miniature"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    return load_shapes(tmp_path_factory.mktemp("shapes") / "shapes.safetensors", 24, seed=0)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run of four steps a stage, saved at each second."""
    monkeypatch.setattr(demo.base_model.train_vae, "NUM_STEPS", 4)
    monkeypatch.setattr(demo.base_model.train_vae, "SAVE_EVERY", 2)
    monkeypatch.setattr(demo.base_model.train_flow, "NUM_STEPS", 4)
    monkeypatch.setattr(demo.base_model.train_flow, "SAVE_EVERY", 2)
    monkeypatch.setattr(demo.base_model.train_flow, "NUM_LATENTS", 64)
    monkeypatch.setattr(demo.base_model.train_base, "NUM_SHAPES", 24)
    monkeypatch.setattr(demo.base_model.train_base, "HELD_OUT_SHAPES", 4)
    monkeypatch.setattr(demo.base_model.quality, "NUM_PROMPTS", 4)
    monkeypatch.setattr(demo.base_model.quality, "NUM_INFERENCE_STEPS", 2)


def test_one_pair_in_ten_is_held_out() -> None:
    held_out = [is_held_out(one, other) for one in COLORS for other in COLORS]
    assert sum(held_out) / len(held_out) == pytest.approx(0.1, abs=0.01)
    trained, tested = ({tuple(p) for p in x.tolist()} for x in (TRAINED_PAIRS, HELD_OUT_PAIRS))
    assert not trained & tested
    # All but the pairs of equal colours: 141 names for 139 colours.
    assert len(trained) + len(tested) == 141**2 - 141 - 4


def test_painted_discs_are_those_of_the_data_set(
    shapes: tuple[torch.Tensor, torch.Tensor],
) -> None:
    from demo.circles import draw_disc, draw_outline, random_circles

    circle = random_circles(24, seed=0)[5]
    pair = torch.tensor([NAMES.index(circle.color), NAMES.index(circle.background)])
    assert caption(pair) == circle.prompt
    drawn = to_pixels(to_uint8(fit(draw_disc(circle), 128)), "-1_1")
    # Both round to 8 bit along the way.
    assert (paint_discs(shapes[0][5:6], PALETTE[pair][None])[0] - drawn).abs().max() < 3 / 127.5
    line = to_pixels(to_uint8(fit(draw_outline(circle), 128)), "-1_1")
    torch.testing.assert_close(paint_outlines(shapes[1][5:6])[0], line)


def test_the_vae_starts_with_the_mean_colour_of_each_patch() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    colors = torch.rand(8, 3, 1, 1) * 1.6 - 0.8
    with torch.no_grad():
        posterior = vae.encode(colors.expand(-1, -1, 64, 64)).latent_dist
        decoded = vae.decode(posterior.mean).sample
    # Flat pictures come back, but for the curvature of two SiLUs and GroupNorm's share of them.
    error = (decoded[:, :, 16:48, 16:48] - colors).abs()
    assert error.mean() < 0.15
    assert error.max() < 0.35
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, -6.0))


def test_training_leaves_the_constant_channels_alone() -> None:
    torch.manual_seed(0)
    vae = build_vae()
    freeze_constant_channels(vae)
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
    vae(torch.rand(2, 3, 32, 32)).sample.square().mean().backward()
    optimizer.step()
    seen: list[torch.Tensor] = []
    for half in (vae.encoder, vae.decoder):
        for block in (half.mid_block, *getattr(half, "down_blocks", ())):
            block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        vae(torch.rand(2, 3, 32, 32))
    assert len(seen) == 6
    for output in seen:
        constants = output[:, CONSTANTS]
        assert constants[:, 0].eq(ANCHOR).all()
        assert constants[:, 1].eq(-ANCHOR).all()


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_an_interrupted_training_ends_in_the_same_bits(
    shapes: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        folder.mkdir(exist_ok=True)
        vae = demo.base_model.train_vae.train_vae(folder / "vae.pt", *shapes, CPU, 0)
        latents = demo.base_model.train_flow.load_latents(
            folder / "latents.safetensors", vae, shapes[0], 0
        )
        pipeline = demo.base_model.train_flow.build_miniature(0)
        demo.base_model.train_flow.train_flow(folder / "flow.pt", pipeline, latents, CPU, 0)
        return vae.state_dict(), pipeline.transformer.state_dict()

    def killed(path: Path, state: dict[str, object]) -> None:
        original(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    original = demo.base_model.train_vae.save_state
    for module in (demo.base_model.train_vae, demo.base_model.train_flow):
        monkeypatch.setattr(module, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "resumed")
    resumed = run(tmp_path / "resumed")
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_command_makes_a_base_that_the_stock_pipeline_loads(tmp_path: Path) -> None:
    arguments = ["--output-dir", tmp_path / "base", "--state-dir", tmp_path / "state"]
    result = CliRunner().invoke(
        demo.base_model.train_base.main, [str(one) for one in (*arguments, "--device", "cpu")]
    )
    assert result.exit_code == 0, result.output
    card = (tmp_path / "base" / "README.md").read_text()
    assert card in result.output
    assert re.search(r"VAE on discs \| \d+\.\d dB", card)
    assert f"{len(HELD_OUT_PAIRS)} were never shown" in card
    assert "of 4 pictures by prompt alone" in card
    assert (tmp_path / "state" / "seed-0" / "flow.pt").is_file()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base")
    assert pipeline.vae.config.scaling_factor != 1.5305
    files = list((tmp_path / "base").rglob("*.safetensors"))
    assert len(files) == 5
    assert sum(path.stat().st_size for path in files) < 16e6
    half = StableDiffusion3Pipeline.from_pretrained(tmp_path / "base", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16


@pytest.mark.slow
def test_the_shipped_base_is_as_good_as_its_card_says(
    shapes: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.base_model.quality, "NUM_PROMPTS", 40)
    pipeline = StableDiffusion3Pipeline.from_pretrained(MINIATURE, dtype=torch.float32)
    found = demo.base_model.quality.measure_base(pipeline, *shapes, seed=1)
    assert found.disc_psnr_db > 30
    assert found.outline_psnr_db > 26
    assert found.latent_mean == pytest.approx(0, abs=0.1)
    assert found.latent_std == pytest.approx(1, abs=0.1)
    assert found.by_prompt.background_color_error < 10
    assert found.by_prompt.patch_color_error < 12
    assert found.by_prompt.num_patches > 30


def test_the_shipped_base_is_small_and_in_half_precision() -> None:
    files = list(MINIATURE.rglob("*.safetensors"))
    assert len(files) == 5
    assert sum(path.stat().st_size for path in MINIATURE.rglob("*") if path.is_file()) < 16e6
    for path in files:
        assert {tensor.dtype for tensor in load_file(path).values()} <= {torch.float16, torch.int64}
