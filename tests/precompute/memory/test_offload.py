"""What `--offload auto` chooses, and what stage 1 says where its encoders do not fit."""

import re
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from common.device import AsyncHostCopy
from common.errors import RunError
from common.memory.need import Need
from precompute.config import PrecomputeConfig
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.memory.offload import choose_offload
from precompute.memory.simulation import read_sizes, text_peaks
from precompute.planning.prepare import prepare
from tests.conftest import Outcome, flags

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_takes_groups_where_whole_encoders_do_not_fit(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = prepare(fresh)
    assert choose_offload(context).config.offload == "none"  # on a CPU
    on_gpu = replace(context, device=CUDA)
    specs = context.specs
    whole = text_peaks(read_sizes(specs.base), specs.text_settings, 2)["none"]
    needed = Need(whole.total).free
    capsys.readouterr()
    for free, chosen in ((needed, "none"), (needed - 1, "groups")):
        monkeypatch.setattr("precompute.memory.offload.free_gpu_bytes", lambda _, free=free: free)
        assert choose_offload(on_gpu).config.offload == chosen
        assert ("--offload groups: the text encoders need" in capsys.readouterr().out) == (
            chosen == "groups"
        )
        given = replace(on_gpu, config=replace(fresh, offload="none"))
        assert choose_offload(given).config.offload == "none"


FULL = "CUDA out of memory. Tried to allocate 32 MiB."


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(f"{FULL}\nmore")


def pinned_is_full(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA error: out of memory\nmore")


@pytest.mark.parametrize(
    ("device", "dtype", "in_groups", "helps"),
    [
        (CUDA, "float16", False, "--offload groups; --text-dtype bfloat16; a device"),
        (CUDA, "bfloat16", True, "more free host memory, .*; a device .*; --device cpu"),
        (CPU, "float16", False, "--text-dtype bfloat16; ending other programs; a machine"),
    ],
)
@pytest.mark.parametrize("fault", [full, pinned_is_full])
def test_text_encoders_that_do_not_fit_say_what_helps(
    fresh: PrecomputeConfig,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[..., None],
    device: torch.device,
    dtype: str,
    in_groups: bool,
    helps: str,
) -> None:
    specs = prepare(fresh).specs
    settings = replace(specs.text_settings, compute_dtype=dtype)
    monkeypatch.setattr(
        CLIPTextModelWithProjection, "from_pretrained", lambda *_, **__: nn.Module()
    )
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", fault)
    says = rf"the text encoders: memory is full \(CUDA .*\)\. What helps: {helps}"
    with pytest.raises(RunError, match=says):
        TextEncoders.load(specs.base, settings, device, None, in_groups=in_groups)


@pytest.mark.parametrize(
    ("device", "dtype", "resolution_px", "helps"),
    [
        (CUDA, "float32", 1024, "--vae-dtype bfloat16; a smaller --resolution; a device"),
        (CUDA, "bfloat16", 1088, "a device that nothing else uses; --device cpu"),
        (CPU, "bfloat16", 64, "a smaller --resolution; ending other programs; a machine"),
    ],
)
def test_a_vae_that_does_not_fit_says_what_helps(
    fresh: PrecomputeConfig,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: str,
    resolution_px: int,
    helps: str,
) -> None:
    specs = prepare(fresh).specs
    settings = replace(specs.latent_settings, compute_dtype=dtype, resolution_px=resolution_px)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", full)
    with pytest.raises(RunError, match=rf"the VAE: memory is full \({FULL}\)\. .*helps: {helps}"):
        VaeEncoder.load(specs.base, settings, device, None)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize(
    ("where", "what"),
    [
        (CLIPTextModelWithProjection, "the text encoders"),
        (T5EncoderModel, "a single prompt"),
        (AutoencoderKL, "a single image"),
        (AsyncHostCopy, "stage 1"),
    ],
)
def test_a_run_in_full_memory_ends_with_a_line(
    fresh: PrecomputeConfig,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    where: type,
    what: str,
    dry: bool,
) -> None:
    name = {
        "the text encoders": "from_pretrained",
        "a single prompt": "forward",
        "a single image": "encode",
        "stage 1": "__init__",
    }
    monkeypatch.setattr(where, name[what], full)
    outcome = command("precompute", *flags(fresh), *(["--dry-run"] if dry else []))
    assert outcome.exit_code == 2
    line = outcome.output.splitlines()[-1]
    assert line.startswith(f"Error: {what}: memory is full ({FULL}). What helps: "), line
    # Of options only those of stage 1.
    named = {one.name for one in fields(PrecomputeConfig)}
    helps = line.partition("What helps")[2]
    assert {one.replace("-", "_") for one in re.findall("--([a-z-]+)", helps)} <= named
    assert "--device" not in helps  # it is the CPU
