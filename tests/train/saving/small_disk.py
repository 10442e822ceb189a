"""Run a module as on a disk that has no room for a large file of process 1."""

import os
import resource
import runpy
import sys

LARGEST_FILE_BYTES = 100_000

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, LARGEST_FILE_BYTES))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
