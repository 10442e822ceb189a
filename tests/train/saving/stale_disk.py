"""Run a module as on a network disk that does not yet show process 1 the newest checkpoint."""

import os
import runpy
import sys
from pathlib import Path

from train.saving import checkpoints

find = checkpoints.find


def find_older(output_dir: Path) -> list[Path]:
    return find(output_dir)[:-1]


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        checkpoints.find = find_older
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
