"""Options of the other stages, typed at a command of infer, are sent where they belong."""

from collections.abc import Callable

import pytest

from tests.conftest import Outcome


@pytest.mark.parametrize("name", ["generate", "score", "serve", "decode"])
def test_all_are_named_at_once(name: str, command: Callable[..., Outcome]) -> None:
    done = command("infer", name, "--max_train_steps=5", "--no-buckets", "--train-data-dir", "x")
    assert done.exit_code == 2
    assert done.output.splitlines() == [
        "Error: --max-train-steps: belongs to python -m train.",
        "  --buckets: belongs to python -m precompute.",
        "  --train-data-dir: belongs to python -m precompute.",
    ]


def test_options_of_the_other_commands_are_named_too(command: Callable[..., Outcome]) -> None:
    done = command("infer", "decode", "--guidance-scale", "1")
    assert done.output == "Error: --guidance-scale: belongs to python -m infer generate.\n"
    assert "belongs" not in command("infer", "generate", "--seed", "1").output
