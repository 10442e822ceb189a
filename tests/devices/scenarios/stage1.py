"""Stage 1 on either of two GPUs."""

from dataclasses import replace
from pathlib import Path

import pytest

from common.device import AsyncHostCopy
from common.errors import RunError
from precompute.config import PrecomputeConfig
from precompute.encoding import batch_size
from precompute.run import precompute
from tests.devices import stand_in


def tars(config: PrecomputeConfig, device: str, folder: Path) -> dict[str, bytes]:
    """Precompute on a device and return the shards."""
    cache = folder / device.replace(":", "-")
    precompute(replace(config, cache=cache, device=device))
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*.tar")}


def test_both_devices_write_the_same_bytes(
    precompute_config: PrecomputeConfig, tmp_path: Path
) -> None:
    first, second = (tars(precompute_config, f"cuda:{index}", tmp_path) for index in range(2))
    assert len(first) > 5
    assert first == second


@pytest.mark.parametrize("chosen_by", ["option", "launcher"])
def test_only_the_chosen_device_is_used(
    chosen_by: str,
    precompute_config: PrecomputeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_size, "LARGEST", 2)
    config = replace(
        precompute_config,
        cache=tmp_path / "cache",
        device="cuda:1" if chosen_by == "option" else None,
        text_batch_size="auto",
        vae_batch_size="auto",
        posterior="mean_std",
    )
    if chosen_by == "launcher":
        # The fourth of four processes, which share two GPUs; each writes its part.
        for name, value in (("LOCAL_RANK", "3"), ("RANK", "3"), ("WORLD_SIZE", "4")):
            monkeypatch.setenv(name, value)
    with stand_in.only("cuda:1"):
        precompute(replace(config, dry_run=True))
        precompute(config)
    assert list(config.cache.rglob("*.tar"))


def test_a_copy_read_too_early_ends_the_run_before_anything_is_written(
    precompute_config: PrecomputeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AsyncHostCopy, "wait", lambda self: self._tensors)
    with pytest.raises(
        RunError, match=r"text, the first batch: .* from cuda:1 .* bytes differ .* plain copy"
    ):
        tars(precompute_config, "cuda:1", tmp_path)
    assert not list(tmp_path.rglob("*.tar"))


def test_layers_that_visit_the_device_give_the_same_records(
    precompute_config: PrecomputeConfig, tmp_path: Path
) -> None:
    configs = [
        replace(precompute_config, cache=tmp_path / offload, device="cuda:1", offload=offload)
        for offload in ("none", "groups")
    ]
    with stand_in.only("cuda:1"):
        for config in configs:
            precompute(config)
    whole, groups = (config.cache for config in configs)
    tars = sorted(path.relative_to(whole) for path in whole.rglob("*.tar"))
    assert tars
    for tar in tars:
        assert (groups / tar).read_bytes() == (whole / tar).read_bytes(), tar
