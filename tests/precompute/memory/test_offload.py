"""What `--offload auto` chooses, and what stage 1 says where its encoders do not fit."""

from dataclasses import replace

import pytest
import torch
from transformers import T5EncoderModel

from common.errors import RunError
from common.memory.need import Need
from precompute.config import PrecomputeConfig
from precompute.encoding.text_encoders import TextEncoders
from precompute.memory.offload import choose_offload
from precompute.memory.simulation import read_sizes, text_peaks
from precompute.planning.prepare import prepare

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
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2 * free))
        assert choose_offload(on_gpu).config.offload == chosen
        assert ("--offload groups: the text encoders need" in capsys.readouterr().out) == (
            chosen == "groups"
        )
        given = replace(on_gpu, config=replace(fresh, offload="none"))
        assert choose_offload(given).config.offload == "none"


@pytest.mark.parametrize(
    ("dtype", "in_groups", "helps"),
    [
        ("float16", False, "--offload groups; --text-dtype bfloat16; a device"),
        ("bfloat16", True, "a device that nothing else uses"),
    ],
)
def test_encoders_that_do_not_fit_say_what_helps(
    fresh: PrecomputeConfig,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    in_groups: bool,
    helps: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32 MiB.\nmore")

    specs = prepare(fresh).specs
    settings = replace(specs.text_settings, compute_dtype=dtype)
    monkeypatch.setattr(T5EncoderModel, "from_pretrained", full)
    says = rf"the text encoders: memory is full \(CUDA out of .* 32 MiB\.\)\. What helps: {helps}"
    with pytest.raises(RunError, match=says):
        TextEncoders.load(specs.base, settings, CPU, None, in_groups=in_groups)
