"""What the command line says reaches whatever it is for."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from sd3.quantized import RowLinear
from shards.reading.cache import Cache
from shards.reading.order import Order
from tests.train.test_run import near_gradient_descent, weights
from train import inputs, loop, models
from train.assembly import assemble
from train.config import TrainConfig
from train.data import Batch
from train.run import train
from train.sets import find


@pytest.fixture
def tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("tf32_as_before")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_run_is_put_together_as_asked_for(
    train_config: TrainConfig, cache: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not tf32
    asked: dict[str, Any] = {}
    find_base, open_files = inputs.find_base, find.open_files

    def found_base(*names: Any, revision: Any, cache_dir: Any, **others: Any) -> Path:
        asked.update(revision=revision, cache_dir=cache_dir)
        return find_base(*names, revision=revision, cache_dir=cache_dir, **others)

    def opened(location: str, folder: Path | None, size: float) -> Any:
        asked.update(local_cache_dir=folder, local_cache_gb=size)
        return open_files(location, folder, size)

    # The base and the cache are on this machine, so these settings are not used.
    monkeypatch.setattr(inputs, "find_base", found_base)
    monkeypatch.setattr(find, "open_files", opened)
    unused = {
        "revision": "v2",
        "cache_dir": Path("models"),
        "local_cache_dir": Path("copies"),
        "local_cache_gb": 7.5,
    }
    config = replace(
        train_config,
        **unused,
        allow_tf32=tf32,
        num_controlnet_layers=1,
        ema_decay=0.37,
        seed=3,
        shuffle_window=1,
        logging_dir="elsewhere",
        report_to="tensorboard",
        mixed_precision="bf16",
        gradient_accumulation_steps=2,
    )
    run = assemble(config)
    assert asked == unused
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert run.controlnet.config.num_layers == 1
    assert run.ema is not None
    assert run.ema.decay == 0.37
    assert run.transformer.dtype == torch.bfloat16
    assert run.accelerator.logging_dir == str(config.output_dir / "elsewhere")
    assert run.accelerator.gradient_accumulation_steps == 2
    shards = Cache(cache).conditioning.product.shard_records
    found = [run.inputs.order.record(place)[1:] for place in range(30)]
    for seed, window in ((3, 1), (0, 1), (3, None)):
        other = Order(shards, seed=seed, window=window)
        same = found == [other.record(place) for place in range(30)]
        assert same == ((seed, window) == (3, 1))


def test_the_schedule_moves_once_a_step_however_many_processes_there_are(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = assemble(replace(train_config, lr_scheduler="constant_with_warmup", lr_warmup_steps=10))
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    for step in (1, 2):
        run.optimizer.step()
        run.schedule.step()
        assert run.schedule.get_last_lr() == pytest.approx([step * 1e-4])


def test_prompts_are_dropped_and_gradients_clipped_as_asked_for(
    train_config: TrainConfig, cache: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Batch] = []
    original = loop.batch_losses

    def batch_losses(batch: Batch, *others: Any) -> torch.Tensor:
        taken.append(batch)
        return original(batch, *others)

    monkeypatch.setattr(loop, "batch_losses", batch_losses)
    config = replace(
        near_gradient_descent(train_config),
        lr_scheduler="constant",
        max_grad_norm=1e-3,
        proportion_empty_prompts=1.0,
        max_train_steps=1,
    )
    train(config)
    empty = Cache(cache).empty_prompt()["pooled_embeds"]
    assert taken[0].pooled_embeds.equal(empty.expand(2, -1))
    before = models.new_controlnet(base, None, 2).state_dict()
    after = weights(config.output_dir)
    moved = torch.stack([(after[name] - before[name]).norm() for name in after]).norm()
    # AdamW's first update is rate * g / (|g| + epsilon), here g / 10 as its epsilon is 1; the
    # norm of all g is 1e-3. Only layers that start at zero have gradients, so nothing is rounded.
    assert float(moved) == pytest.approx(0.1 * 1e-3, rel=2e-3)


def test_networks_are_prepared_as_asked_for(train_config: TrainConfig, base: Path) -> None:
    config = replace(
        train_config,
        quantize_base="fp8",
        bf16_weights=True,
        checkpointing="full",
    )
    transformer = models.load_transformer(base, None, torch.bfloat16)
    controlnet = models.new_controlnet(base, None, 2)
    exact = {name: tensor.clone() for name, tensor in controlnet.state_dict().items()}
    models.prepare_base(config, transformer)
    models.prepare_controlnet(config, controlnet)
    products = [module for module in transformer.modules() if isinstance(module, RowLinear)]
    assert len(products) > 20
    assert {module.values.dtype for module in products} == {torch.float8_e4m3fn}
    assert transformer.is_gradient_checkpointing
    assert controlnet.is_gradient_checkpointing
    for name, tensor in (*controlnet.named_parameters(), *controlnet.named_buffers()):
        assert tensor.equal(exact[name].bfloat16()), name
    assert exact["pos_embed.pos_embed"].any()


def test_weights_are_those_of_the_variant(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "transformer", tmp_path / "transformer")
    transformer = models.load_transformer(base, None, torch.float32)
    with torch.no_grad():
        transformer.proj_out.bias.fill_(0.25)
    transformer.save_pretrained(tmp_path / "transformer", variant="other")
    for variant in (None, "other"):
        loaded = models.load_transformer(tmp_path, variant, torch.float32)
        assert bool((loaded.proj_out.bias == 0.25).all()) == (variant == "other")
