"""--dropout-t5, -clip, -pooled, -control: zeros where the networks would have got something."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from sd3.prompt_embeds import prompt_embeds
from shards.reading.cache import Cache
from tests.conftest import Outcome, flags
from train import loop
from train.config import DROPPED, TrainConfig
from train.data import Batch, Dropout, TrainingSamples
from train.inputs import find_inputs, make_objective
from train.loss import batch_losses
from train.run import train


def samples(config: TrainConfig, dropout: Dropout | None = None) -> TrainingSamples:
    inputs = find_inputs(config, 1)
    return TrainingSamples(
        [inputs.cache], inputs.order, seed=0, proportion_empty_prompts=0.2, dropout=dropout
    )


def test_each_part_is_dropped_as_often_as_asked_and_by_itself(train_config: TrainConfig) -> None:
    chances = Dropout(t5=0.5, clip=0.2, pooled=0.7, control=0.0)
    dropping, plain = samples(train_config, chances), samples(train_config)
    kept = torch.stack([dropping[place]["kept"] for place in range(1000)])
    for column, chance in enumerate(chances.chances):
        dropped = 1 - kept[:, column].mean().item()
        assert dropped == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 1000) ** 0.5)
    both = ((kept[:, 0] == 0) & (kept[:, 2] == 0)).float().mean().item()
    assert both == pytest.approx(0.35, abs=4 * (0.35 * 0.65 / 1000) ** 0.5)
    # All else is drawn as without.
    for place in (0, 7, 500):
        ours, others = dropping[place], plain[place]
        assert ours.keys() - others.keys() == {"kept"}
        assert all(torch.equal(ours[name], others[name]) for name in others)


class Seen:
    """A network that notes what it gets."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.got: dict[str, Tensor] = {}

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        self.got = inputs
        return (inputs["hidden_states"],)


@pytest.mark.parametrize("convention", ["prompt", "zeros"])
@pytest.mark.parametrize("part", DROPPED)
def test_what_is_dropped_is_zero_for_the_networks(
    train_config: TrainConfig, part: str, convention: Any
) -> None:
    config = replace(train_config, pooled_projection=convention)
    found = samples(config)
    batch = found.fill(found.allocate(3), range(3))
    kept = torch.ones(3, 4)
    kept[1, DROPPED.index(part)] = 0
    dropping = Batch(**(vars(batch) | {"kept": kept}))
    objective = make_objective(config, find_inputs(config, 1), torch.device("cpu"))
    controlnet, transformer = Seen(), Seen()
    with torch.no_grad():
        batch_losses(batch, controlnet, transformer, objective)
        whole = controlnet.got, transformer.got
        batch_losses(dropping, controlnet, transformer, objective)
    for before, after in zip(whole, (controlnet.got, transformer.got), strict=True):
        embeds = before["encoder_hidden_states"].clone()
        clip = torch.zeros_like(batch.clip_embeds[1:2])
        t5 = torch.zeros_like(batch.t5_embeds[1:2])
        if part in ("clip", "t5"):
            parts = {"clip": batch.clip_embeds[1:2], "t5": batch.t5_embeds[1:2]}
            parts[part] = {"clip": clip, "t5": t5}[part]
            embeds[1] = prompt_embeds(parts["clip"], parts["t5"])[0]
        assert torch.equal(after["encoder_hidden_states"], embeds)
        pooled = before["pooled_projections"].clone()
        if part == "pooled":
            pooled[1] = 0
        assert torch.equal(after["pooled_projections"], pooled)
    control = whole[0]["controlnet_cond"].clone()
    assert control[1].abs().max() > 0
    if part == "control":
        control[1] = 0
    assert torch.equal(controlnet.got["controlnet_cond"], control)


def test_training_drops_what_the_options_say(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Batch] = []
    original = loop.batch_losses

    def noted(batch: Batch, *others: Any) -> Tensor:
        taken.append(batch)
        return original(batch, *others)

    monkeypatch.setattr(loop, "batch_losses", noted)
    config = replace(train_config, dropout_clip=1.0, dropout_pooled=1.0, max_train_steps=1)
    train(config)
    expected = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(2, 4)
    assert all(batch.kept is not None and torch.equal(batch.kept, expected) for batch in taken)
    nothing = {"dropout_clip": 0.0, "dropout_pooled": 0.0}
    train(replace(config, **nothing, output_dir=Path(f"{config.output_dir}-whole")))
    assert taken[-1].kept is None


def test_chances_beyond_1_are_refused(
    train_config: TrainConfig, command: Callable[..., Outcome]
) -> None:
    for name in DROPPED:
        with pytest.raises(ConfigError, match=rf"--dropout-{name} 1.5: must be in 0 to 1"):
            replace(train_config, **{f"dropout_{name}": 1.5})
    with pytest.raises(ConfigError, match=r"--dropout-control 1\.0: the ControlNet would never"):
        replace(train_config, dropout_control=1.0)
    outcome = command("train", *flags(train_config), "--dropout-t5", "-1")
    assert "--dropout-t5 -1.0: must be in 0 to 1" in outcome.output


def test_a_dropped_embedding_is_that_of_the_stock_pipeline_without_t5(
    train_config: TrainConfig, cache: Path, base: Path
) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None)
    found = Cache(cache)
    prompts = found.sample(0, 0)[2]
    prompt = str(found.text.metadata(*found.text.locate(prompts[0]))["prompt"])
    record = found.embeddings(prompts[0])
    spec = found.manifest.text_spec
    with torch.no_grad():
        expected, _, _, _ = pipeline.encode_prompt(
            prompt, None, None, max_sequence_length=spec.max_sequence_length
        )
    ours = prompt_embeds(record["clip_embeds"][None], torch.zeros_like(record["t5_embeds"])[None])
    torch.testing.assert_close(ours, expected)
