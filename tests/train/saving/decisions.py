"""What two processes make of what each of them finds; prints one line a case and process."""

import os
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState

from common.errors import ConfigError
from train.processes.agreement import check_same_everywhere, local_main_first, main_decides
from train.processes.group import group_closed_at_the_end


def attempt(name: str, call: Callable[[], object]) -> None:
    try:
        result = str(call())
    except ConfigError as error:
        result = f"refused: {error}"
    # One write a line: both processes print into the same pipe.
    os.write(1, f"{PartialState().process_index} {name} {result}\n".encode())


def fail() -> None:
    raise ConfigError("not here")


if __name__ == "__main__":
    state = PartialState(cpu=True)
    with group_closed_at_the_end():
        own = f"found by {state.process_index}"
        attempt("decided", lambda: main_decides(lambda: Path(own)))
        attempt("failed", lambda: main_decides(fail))
        downloaded = Path(os.environ["DOWNLOADS"]) / "model"

        def download() -> str:
            if downloaded.exists():
                return "there"
            downloaded.touch()
            return "downloaded"

        attempt("first", lambda: local_main_first(download))
        attempt("same", lambda: check_same_everywhere({"--cache": "a"}))
        attempt("different", lambda: check_same_everywhere({"--cache": own}))
