"""How long each stage of a demonstration took, kept between runs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.atomic_files import write_text
from shards.format.json_files import digest


class Times:
    """Seconds by stage, in a file.

    An interrupted stage's runs add up until it has finished; running it again, which does next to
    nothing, changes no more. With other settings all begins anew.

    Args:
        path: the file.
        settings: what the stages are run with.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path = path
        self.settings = digest(settings)
        self.seconds: dict[str, float] = {}
        self.finished: list[str] = []
        if path.is_file():
            known = json.loads(path.read_text())
            if known["settings"] == self.settings:
                self.seconds, self.finished = known["seconds"], known["finished"]

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time what is done inside; an exception leaves the stage unfinished."""
        start = time.monotonic()
        finished = False
        try:
            yield
            finished = True
        finally:
            if stage not in self.finished:
                taken = time.monotonic() - start
                self.seconds[stage] = self.seconds.get(stage, 0.0) + taken
                self.finished += [stage] if finished else []
                self._save()

    def _save(self) -> None:
        known = {
            "settings": self.settings,
            "seconds": self.seconds,
            "finished": self.finished,
        }
        write_text(self.path, json.dumps(known, indent=1) + "\n")
