"""Which models come to the device and which leave it, with a device that computes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from infer.placement import TOGETHER, place, place_controlnet

META = torch.device("meta")


class Noted(nn.Linear):
    """A model that notes where it is sent."""

    def __init__(self, name: str, notes: list[tuple[str, str]]) -> None:
        super().__init__(2, 2, device=META)
        self.name, self.notes = name, notes

    def to(self, device: Any) -> "Noted":
        self.notes.append((self.name, torch.device(device).type))
        return self


def calls(offload: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, str]]]:
    """Return what is sent where before each model computes."""
    monkeypatch.setattr("infer.placement.bring_in_groups", lambda t5, device: None)
    monkeypatch.setattr("infer.placement.StreamedBlocks", lambda network, count, device: None)
    notes: list[tuple[str, str]] = []
    models = {name: Noted(name, notes) for names in TOGETHER for name in names}
    models["transformer"].transformer_blocks = nn.ModuleList([nn.Identity()])
    base = {name: model for name, model in models.items() if name != "controlnet"}
    place(SimpleNamespace(components=base, **base), offload, META)
    # One ControlNet after another; nothing is heard of the first again.
    for controlnet in (Noted("before", notes), models["controlnet"]):
        controlnet.transformer_blocks = nn.ModuleList([nn.Identity()])
        changed = base | {"controlnet": controlnet}
        place_controlnet(SimpleNamespace(components=changed, **changed), offload, META)
    found = {}
    for name, model in models.items():
        notes.clear()
        model(torch.empty(1, 2, device=META))
        found[name] = sorted(notes)
    return found


def test_models_that_compute_together_come_and_the_others_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = calls("model", monkeypatch)
    text = [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]
    assert found["text_encoder"] == [
        ("controlnet", "cpu"),
        ("text_encoder", "meta"),
        ("transformer", "cpu"),
        ("vae", "cpu"),
    ]
    # T5's layers come by themselves.
    assert found["text_encoder_3"] == [
        ("controlnet", "cpu"),
        ("transformer", "cpu"),
        ("vae", "cpu"),
    ]
    assert found["vae"] == [
        ("controlnet", "cpu"),
        *text,
        ("transformer", "cpu"),
        ("vae", "meta"),
    ]
    assert found["controlnet"] == [("controlnet", "meta"), *text, ("vae", "cpu")]
    assert found["transformer"] == [*text, ("transformer", "meta"), ("vae", "cpu")]


def test_networks_whose_blocks_are_streamed_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls("groups", monkeypatch)
    text = [("text_encoder", "cpu"), ("text_encoder_2", "cpu")]
    assert found["text_encoder_2"] == [("text_encoder_2", "meta"), ("vae", "cpu")]
    assert found["vae"] == [*text, ("vae", "meta")]
    assert found["controlnet"] == found["transformer"] == [*text, ("vae", "cpu")]
