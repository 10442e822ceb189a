"""What tests of sealing and of reading share."""

from collections import Counter

import pytest

from shards.format import sidecar


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each sidecar is parsed from now on, by its path."""
    times: Counter[str] = Counter()
    original = sidecar.from_json

    def from_json(data: bytes, shard: int, where: object) -> sidecar.Sidecar:
        times[str(where)] += 1
        return original(data, shard, where)

    monkeypatch.setattr(sidecar, "from_json", from_json)
    return times
