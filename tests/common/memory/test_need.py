"""What must be free for a stage's tensors."""

from common.memory.need import Need, card_bytes


def test_a_device_needs_more_than_the_tensors() -> None:
    need = Need(device=10_000_000_000)
    # A twentieth on top, and half a gigabyte.
    assert need.free == 11_000_000_000
    assert need.fits(11_000_000_000)
    assert not need.fits(10_999_999_999)


def test_of_a_card_as_it_is_sold_a_part_is_gone() -> None:
    # Eight GiB are 8.590 GB.
    assert card_bytes(8) == round(8.589934592e9 * 0.96)
