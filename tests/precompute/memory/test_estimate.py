"""What stage 1 says beforehand of the memory that it needs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.memory.need import Need
from precompute.config import PrecomputeConfig
from precompute.fingerprints.encoder_spec import latent_settings, text_settings
from precompute.memory import estimate
from precompute.memory.estimate import advice, find_sizes, need, report
from precompute.memory.simulation import Peak, image_peak, text_peaks
from tests.conftest import Outcome


@pytest.fixture(scope="module")
def bare(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoders' configurations alone, with wide layers of T5."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        config = json.loads((base / name / "config.json").read_text())
        if name == "text_encoder_3":
            config |= {"d_ff": 8192, "num_layers": 6}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def asked(bare: Path) -> PrecomputeConfig:
    return PrecomputeConfig(
        pretrained_model_name_or_path=str(bare),
        cache=Path(),
        estimate=True,
        resolution=64,
        max_sequence_length=20,
    )


def test_the_larger_pass_counts(asked: PrecomputeConfig) -> None:
    sizes = find_sizes(asked)
    text = text_peaks(sizes, text_settings(asked), 32)["none"]
    assert need(asked, None) == Need(text.total, 0, "--offload none")
    large = replace(asked, resolution=512, offload="groups", text_batch_size=1)
    images = image_peak(sizes, latent_settings(large), 1)
    host = text_peaks(sizes, text_settings(large), 1)["groups"].host
    assert need(large, None) == Need(images.total, host)


def test_what_is_auto_counts_as_on_a_device_that_it_just_fits(asked: PrecomputeConfig) -> None:
    given = replace(asked, offload="none", text_batch_size=32, vae_batch_size=1)
    auto = replace(given, text_batch_size="auto", vae_batch_size="auto")
    assert need(auto, None) == need(given, None)
    more = replace(given, resolution=512, vae_batch_size=2)
    assert need(more, None).device > need(replace(more, vae_batch_size=1), None).device


def test_auto_takes_groups_on_a_device_too_small_for_all(asked: PrecomputeConfig) -> None:
    whole = need(asked, None)
    assert need(asked, whole.free) == whole
    groups = need(asked, whole.free - 1)
    assert groups.chosen == "--offload groups"
    assert groups.device < whole.device
    assert groups == replace(
        need(replace(asked, offload="groups"), None), chosen="--offload groups"
    )


def test_the_largest_bucket_counts(asked: PrecomputeConfig) -> None:
    square = replace(asked, resolution=512, offload="groups", text_batch_size=1)
    buckets = replace(square, buckets=True)
    shapes = latent_settings(buckets).shapes
    largest = max(width * height for width, height in shapes) / 512**2
    assert largest > 1
    found, expected = need(buckets, None).device, need(square, None).device * largest
    assert found == pytest.approx(expected, rel=0.01)


def test_it_is_asked_for_without_data_cache_and_weights(
    bare: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    name = ("--pretrained-model-name-or-path", bare)
    outcome = command("precompute", "--estimate", *name, "--conditioning-from", "depth")
    assert outcome.exit_code == 0, outcome.output
    assert "must be free" in outcome.output
    assert "not counted: what --conditioning-from depth takes" in outcome.output
    assert "text with --offload groups" in outcome.output
    forgotten = command("precompute", "--estimate")
    assert forgotten.exit_code == 2
    assert "Missing option '--pretrained-model-name-or-path'." in forgotten.output
    misspelt = command("precompute", "--estimate", name[0], tmp_path / "bas")
    assert misspelt.exit_code == 2
    assert "bas': no such folder" in misspelt.output


def test_it_says_what_takes_how_much(
    asked: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {
        "none": Peak(13_000_000_000, 1_000_000_000),
        "groups": Peak(3_000_000_000, 1_000_000_000, 12_000_000_000),
    }
    monkeypatch.setattr(estimate, "text_peaks", lambda *_: peaks)
    monkeypatch.setattr(estimate, "image_peak", lambda *_: Peak(100_000_000, 2_400_000_000))
    sizes = find_sizes(asked)
    found = estimate.estimate(asked, sizes, None)
    assert list(report(asked, found, None)) == [
        "device memory of stage 1 in GB (10^9 bytes); its two passes follow each other:",
        "   13.00  text encoders, whole",
        "    1.00  32 prompts at once",
        "   14.00  together",
        "    0.10  VAE",
        "    2.40  1 image of 64 x 64 px at once",
        "    2.50  together",
        # 14 and a twentieth, and half a GB
        "   15.20  must be free (14.16 GiB): the larger pass,",
        "          a twentieth for what is lost between tensors, and CUDA's 0.5",
        "--offload auto is --offload none where it fits",
        "batches of auto grow as far as the device has room",
    ]
    assert advice(asked, sizes, found) == [
        "less, in GB:",
        "    4.00  text with --offload groups, and 12.0 of host memory",
    ]
    found = estimate.estimate(asked, sizes, 15_100_000_000)
    lines = list(report(asked, found, 15_100_000_000))
    assert "   12.00  of host memory a process, for T5; some 2 for the program" in lines
    assert "--offload auto is --offload groups" in lines
    assert lines[-1] == "this GPU has 15.10 GB free (14.06 GiB): fits"
    assert advice(asked, sizes, found) == ["no option would make it less"]


@pytest.mark.slow
def test_a_gpu_is_asked_what_it_has_free(
    asked: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "free_gpu_bytes", lambda name: 10_000 if name is None else None)
    estimate.print_estimate(asked)
    assert "this GPU has 0.00 GB free (0.00 GiB): does not fit" in capsys.readouterr().out
    estimate.print_estimate(replace(asked, device="cpu"))
    assert "this GPU" not in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    estimate.print_estimate(asked)
    assert not capsys.readouterr().out
