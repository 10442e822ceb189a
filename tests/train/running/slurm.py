"""A stand-in for Slurm: runs the batch scripts of the docs and sends what signals Slurm sends.

`srun` starts a step of one task. `--signal=B:…` and `--signal=…` go to the script alone and to
the processes of its steps alone. SIGTERM makes srun kill its task. `scancel --signal` reaches all
processes of the steps and not the script. `scontrol requeue` is noted.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY, kill_with_children

WAIT_S = 120
# What Slurm's own programs do, as far as the scripts use them. $STATE is a folder.
SRUN = """
import os, signal, subprocess, sys
environment = os.environ | {"SLURM_NODEID": "0"}
task = subprocess.Popen(sys.argv[1:], env=environment, start_new_session=True)
open(os.environ["STATE"] + "/step", "w").write(str(task.pid))
signal.signal(signal.SIGTERM, lambda *_: os.killpg(task.pid, signal.SIGKILL))
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
sys.exit(abs(task.wait()))
"""
SCANCEL = """
import os, sys
from tests.train.running.slurm import signal_step
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
signal_step(os.environ["STATE"], "SIGTERM")
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
else:
    assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]], sys.argv
    open(os.environ["STATE"] + "/requeued", "a").write("x")
"""


def batch_script(page: str) -> str:
    """Return the batch script on a page of docs/."""
    text = (REPOSITORY / "docs" / page).read_text()
    (script,) = re.findall(r"(?m)^    #!/bin/bash\n(?:    .*\n)*", text)
    return re.sub(r"(?m)^    ", "", script)


def signal_step(state: str, name: str) -> None:
    """Send a signal to every process of the step at once, as slurmstepd does."""
    task = psutil.Process(int((Path(state) / "step").read_text()))
    for process in [task, *task.children(recursive=True)]:
        process.send_signal(signal.Signals[name])


class Slurm:
    """Runs batch scripts in a folder that stands for a checkout.

    Args:
        folder: where they run.
        script: of the batch job.
    """

    def __init__(self, folder: Path, script: str) -> None:
        self.folder = folder
        self.script = script
        self.jobs: list[subprocess.Popen[str]] = []
        programs = folder / "programs"
        programs.mkdir()
        for name, code in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
            (programs / name).write_text(f"#!{sys.executable}\n{code}")
            (programs / name).chmod(0o755)
        activate = folder / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        environment = f"{programs}:{Path(sys.executable).parent}:$PATH"
        activate.write_text(f'PATH="{environment}"\n')

    @property
    def requeued(self) -> int:
        """How many times the job was put back into the queue."""
        path = self.folder / "requeued"
        return len(path.read_text()) if path.exists() else 0

    def start(self) -> subprocess.Popen[str]:
        """Start the batch script; its output goes to `slurm.out`."""
        (self.folder / "step").unlink(missing_ok=True)
        path = self.folder / "job.sh"
        path.write_text(self.script)
        slurm = {
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "node[0-0]",
            "SLURM_GPUS_ON_NODE": "2",
            "SLURM_ARRAY_TASK_ID": "0",
            "STATE": str(self.folder),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        }
        with self.output.open("a") as output:
            job = subprocess.Popen(
                ["bash", str(path)],
                cwd=self.folder,
                env=os.environ | slurm,
                stdout=output,
                stderr=output,
                text=True,
            )
        self.jobs.append(job)
        return job

    def kill(self) -> None:
        """Kill all that still runs, as after a failed test."""
        for job in self.jobs:
            kill_with_children(job)

    @property
    def output(self) -> Path:
        """What the job has printed."""
        return self.folder / "slurm.out"

    def warn(self, job: subprocess.Popen[str]) -> None:
        """Send what `#SBATCH --signal` says, as at the time limit."""
        (to_script, name) = re.findall(r"--signal=(B:)?([A-Z0-9]+)@\d+", self.script)[0]
        if to_script:
            job.send_signal(signal.Signals[f"SIG{name}"])
        else:
            signal_step(str(self.folder), f"SIG{name}")


def until(is_so: Callable[[], bool], job: subprocess.Popen[str], output: Path) -> None:
    """Wait until something is so while a job runs."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert job.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)
