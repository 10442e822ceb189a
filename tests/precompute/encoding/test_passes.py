"""The passes, shard by shard: what they encode, keep and leave out, and with which models."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import RunError, ShardError
from precompute.config import PrecomputeConfig
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.first_batch import compare
from precompute.encoding.image_pass import ImagePass, LoadedImages, encode_images
from precompute.encoding.load_image import SourceImages
from precompute.encoding.pipeline import batches_of, finite_items
from precompute.encoding.text_encoders import LongPrompts, TextEncoders
from precompute.encoding.text_pass import TextPass, encode_text
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.fingerprints.encoder_spec import LatentSettings
from precompute.planning.context import Context
from precompute.planning.prepare import prepare
from precompute.sources.source import Kind
from shards.format import sidecar
from shards.format.members import Members
from shards.format.writer import write_shard
from tests.precompute.test_again import again, edit  # noqa: F401  (a fixture)
from tests.precompute.test_bad_rows import spoil

CPU = torch.device("cpu")


@pytest.fixture
def context(fresh: PrecomputeConfig) -> Context:
    return prepare(replace(fresh, validation_prompt=(), validation_image=()))


@pytest.fixture
def vae(context: Context) -> VaeEncoder:
    return VaeEncoder.load(context.specs.base, context.specs.latent_settings, CPU, None)


def image_pass(context: Context, vae: VaeEncoder, kind: Kind) -> ImagePass:
    return ImagePass(context, SourceImages(context), vae, BatchSize(2), kind)


def test_latents_that_are_not_finite_are_left_out(context: Context, vae: VaeEncoder) -> None:
    latents = image_pass(context, vae, "image")
    build = latents.prepare(0)
    _, second, *_ = batches_of(build, 2)
    tensors = {"latent": torch.zeros(2, 16, 8, 8), "latent_std": torch.zeros(2, 16, 8, 8)}
    tensors["latent_std"][1, 3, 4, 5] = torch.inf
    loaded = LoadedImages(None, {})
    records = latents.records(second, loaded, tensors, finite_items(tensors))
    assert [record.key for record in records] == [build.keys[2]]
    assert {row: one.reason for row, one in build.skipped.items()} == {3: "latent is not finite"}


def test_a_conditioning_image_without_its_latent_is_left_out(
    context: Context, vae: VaeEncoder
) -> None:
    latents, controls = (image_pass(context, vae, kind) for kind in ("image", "conditioning_image"))
    with pytest.raises(ShardError, match="shard 000000 vanished"):
        controls.prepare(0)
    build = latents.prepare(0)
    records = [Members(key, b"", b"") for at, key in enumerate(build.keys) if at != 5]
    write_shard(build.product.folder, 0, records, fingerprint="")
    left_out = controls.prepare(0)
    assert left_out.to_encode == set(range(len(build.keys))) - {5}
    assert left_out.skipped == {}  # the latents' sidecar says why


def test_a_shard_with_too_many_bad_rows_is_finished_before_the_run_ends(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(circles, tmp_path / "source")
    path = source / "target" / "3.png"
    spoil(path)
    context = prepare(
        replace(fresh, source=source, strict=True, validation_prompt=(), validation_image=())
    )
    with pytest.raises(ShardError, match=r"1 of 10 rows cannot be used"):
        encode_images(context, {}, lambda: None, EncoderClock(CPU))
    card = sidecar.load(context.products.latents.folder, 0)
    assert card is not None
    assert len(card.keys) == 7
    assert [one.row for one in card.skipped] == ["line 4, target/3.png"]


def test_kept_and_encoded_records_stand_in_the_order_of_their_slots(
    again: PrecomputeConfig,  # noqa: F811
) -> None:
    text = again.cache / "text"
    before = [card for shard in range(6) if (card := sidecar.load(text, shard))]
    # Prompts 4 and 7, the empty one being 0, stand in the first and in the second slot of a shard.
    edit(again, lambda rows: rows[3].update(prompt="new 3"))
    edit(again, lambda rows: rows[6].update(prompt="new 6"))
    context = prepare(replace(again, validation_prompt=(), validation_image=()))
    encode_text(context, lambda: None, EncoderClock(CPU))
    changed = []
    for shard, card in enumerate(before):
        now = sidecar.load(text, shard)
        assert now is not None
        assert [key.split("-")[1] for key in now.keys] == [key.split("-")[1] for key in card.keys]
        pairs = zip(card.keys, now.keys, strict=True)
        changed += [(shard, slot) for slot, (one, other) in enumerate(pairs) if one != other]
    assert changed == [(2, 0), (3, 1)]


def test_embeddings_that_are_not_finite_end_the_run(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextPass(context)
    original = TextEncoders.encode

    def overflowing(self: TextEncoders, *inputs: object) -> dict[str, Tensor]:
        tensors = original(self, *inputs)  # type: ignore[arg-type]
        tensors["t5_embeds"][-1, 2, 3] = torch.nan
        return tensors

    monkeypatch.setattr(TextEncoders, "encode", overflowing)
    batch = next(batches_of(text.prepare(0), 2))
    loaded = text.load(batch)
    tensors = text.encode(loaded)
    assert tensors is not None
    first = context.prompt(int(batch.build.plan.items[1]))
    with pytest.raises(ShardError, match=f"t5_embeds of the prompt {first!r} is not finite"):
        list(text.records(batch, loaded, tensors, finite_items(tensors)))
    with pytest.raises(ShardError, match="t5_embeds of the prompt 'validation' is not finite"):
        text.encode_prompt("validation")


def test_prompts_of_just_the_limit_are_not_cut() -> None:
    found = LongPrompts("tokens than", 20)
    assert found.describe() == []
    for num_tokens in (20, 21, 7, 30, 22, 23):
        found.add(f"of {num_tokens}", num_tokens)
    assert found.describe() == [
        "4 prompts have more tokens than 20 and are cut; the longest has 30: "
        "'of 21', 'of 22', 'of 23', …"
    ]


def test_the_variant_that_is_asked_for_is_loaded(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "vae", tmp_path / "vae")
    plain = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor / 2 for name, tensor in load_file(plain).items()}
    save_file(weights, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    name = "encoder.conv_in.weight"
    for variant, factor in ((None, 2), ("fp16", 1)):
        loaded = VaeEncoder.load(tmp_path, settings(64), CPU, variant)
        assert torch.equal(loaded.vae.state_dict()[name], factor * weights[name])


def test_the_mean_is_stored_where_the_posterior_is_wide(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["encoder.conv_out.bias"][16:] = 0  # a standard deviation of 1
    save_file(weights, path)
    stock = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae")
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        posterior = stock.encode(pixels / 255 * 2 - 1).latent_dist
    assert posterior.std.min() > 0.9
    found = VaeEncoder.load(tmp_path, settings(64), CPU, None)
    latent = found.encode(pixels, "-1_1", "latent", BatchSize(1))["latent"]
    torch.testing.assert_close(latent, posterior.mean, rtol=1e-4, atol=1e-4)


def settings(side: int) -> LatentSettings:
    return LatentSettings(
        side, [(side, side)], "mean", "float32", "float32", "white", allow_tf32=True
    )


@pytest.mark.parametrize(("side", "tiled"), [(1024, False), (1088, True)])
def test_large_images_are_encoded_in_tiles(base: Path, side: int, tiled: bool) -> None:
    assert VaeEncoder.load(base, settings(side), CPU, None).vae.use_tiling is tiled


class LateCopy:
    """A copy to the host that arrives when somebody waits for the device, and not before."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.host = tensor, torch.zeros_like(tensor)

    def wait(self) -> dict[str, Tensor]:
        return {"latent": self.host}

    def arrive(self) -> None:
        self.host.copy_(self.tensor)


def test_a_copy_is_read_before_anything_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    latents = torch.rand(2, 3)
    copy = LateCopy(latents)
    original = Tensor.cpu

    def cpu(self: Tensor) -> Tensor:
        copy.arrive()
        return original(self)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    with pytest.raises(RunError, match=r"\d+ of 24 bytes differ from those of a plain copy"):
        compare("latents", {"latent": latents}, copy, lambda: None)  # type: ignore[arg-type]
    copy.arrive()
    compare("latents", {"latent": latents}, copy, lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [0, 31])
def test_one_wrong_item_of_many_is_noticed(wrong: int) -> None:
    latents = torch.rand(32, 3) + 1
    copy = LateCopy(latents)
    copy.arrive()

    def again_with(change: float) -> dict[str, Tensor]:
        other = latents.clone()
        other[wrong] *= 1 + change
        return {"latent": other}

    compare("x", {"latent": latents}, copy, lambda: again_with(0.09))  # type: ignore[arg-type]
    for change in (0.11, -1.0, np.nan):
        with pytest.raises(RunError, match="encoded again, an item differs by"):
            compare("x", {"latent": latents}, copy, lambda: again_with(change))  # type: ignore[arg-type]  # noqa: B023
