"""Advice is given where the figures say so, and not on those of runs that are well."""

import pytest

from train.dashboard.advice import advice

Losses = dict[int, dict[str, list[float]]]


def held_out(*means: float) -> Losses:
    """Return held-out losses of validations a hundred steps apart, equal at all levels."""
    return {100 * number: {"held_out_loss": [mean] * 8} for number, mean in enumerate(means)}


FALLING = [(step, 1 - step / 10_000) for step in range(10, 900, 10)]
LEVEL = [(step, 1.0) for step in range(10, 900, 10)]


@pytest.mark.parametrize(
    ("means", "losses", "expected"),
    [
        ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), LEVEL, {"unmoved"}),
        ((1.0, 1.1, 1.2, 1.0, 0.999, 1.18), LEVEL, {"unmoved"}),
        # The first 750 steps of the demo's circles, at a high learning rate: it comes down again.
        ((0.2998, 0.3745, 0.4243, 0.4145, 0.3890, 0.3898), FALLING, set()),
        ((1.0, 1.0, 1.0, 1.0, 1.0), LEVEL, set()),  # too early to say
        ((1.0, 1.0, 1.0, 0.99, 1.0, 1.0), LEVEL, set()),
        ((1.0, 0.8, 0.6, 0.5, 0.45, 0.44, 0.44), FALLING, set()),
        ((1.0, 0.8, 0.6, 0.62, 0.64, 0.66), FALLING, {"by heart"}),
        ((1.0, 0.8, 0.6, 0.62, 0.64, 0.66), LEVEL, set()),  # training does not fall either
        ((1.0, 0.8, 0.6, 0.62, 0.61, 0.66), FALLING, set()),  # up and down
        ((1.0, 0.8, 0.6, 0.601, 0.602, 0.603), FALLING, set()),  # too little
        ((1.0, 0.8, 0.6, 0.62, 0.64), FALLING, set()),
        ((), [], set()),
        ((1.0,), [], set()),
    ],
)
def test_advice_is_what_the_figures_say(
    means: tuple[float, ...], losses: list[tuple[int, float]], expected: set[str]
) -> None:
    assert advice(held_out(*means), losses).keys() == expected


def test_one_noise_level_that_falls_is_enough() -> None:
    found = held_out(*[1.0] * 6)
    found[300]["held_out_loss"][7] = 0.9
    found[300]["held_out_loss"][0] = 1.5
    assert not advice(found, LEVEL)


def test_the_average_of_the_weights_counts_too() -> None:
    found = held_out(*[1.0] * 6)
    found[500]["ema_held_out_loss"] = [0.9] * 8
    assert not advice(found, LEVEL)
