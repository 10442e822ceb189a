"""What must be free for a stage's tensors."""

from common.memory.need import Need


def test_a_device_needs_more_than_the_tensors() -> None:
    need = Need(device=10_000_000_000)
    # A twentieth on top, and half a gigabyte.
    assert need.free == 11_000_000_000
    assert need.fits(11_000_000_000)
    assert not need.fits(10_999_999_999)
