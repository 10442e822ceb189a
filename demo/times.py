"""How long each stage of a demonstration took, over all runs of the demonstration."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.atomic_files import write_text
from shards.format.json_files import digest


class StageTimes:
    """The seconds that each stage took, kept in a file.

    The time of an interrupted run is added to the time of the run that continues it. Once a stage
    has finished, its time stays. All times start again when the settings change.

    Args:
        path: the file.
        settings: text of the settings that the stages run with.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        self.settings = digest(settings)
        self.seconds: dict[str, float] = {}
        self.finished: list[str] = []
        if path.is_file():
            saved = json.loads(path.read_text())
            if saved["settings"] == self.settings:
                self.seconds, self.finished = saved["seconds"], saved["finished"]

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time the body of the `with`; an exception in it leaves the stage unfinished."""
        start = time.monotonic()
        finished = False
        try:
            yield
            finished = True
        finally:
            if stage not in self.finished:
                elapsed = time.monotonic() - start
                self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
                if finished:
                    self.finished.append(stage)
                self._save()

    def _save(self) -> None:
        state = {
            "settings": self.settings,
            "seconds": self.seconds,
            "finished": self.finished,
        }
        write_text(self.path, json.dumps(state, indent=1) + "\n")
