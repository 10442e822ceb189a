"""The table of faults: one TOML file for each area of the code, in faults/.

tests = ["tests/train/test_objective.py"]

[[fault]]
file = "train/objective.py"
what = "the shift is added, not subtracted"
old = "(latent - shift_factor)"
new = "(latent + shift_factor)"
survives = "…"      # only if no quick test finds it: why that is accepted
"""

from pathlib import Path

import msgspec

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "faults"


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One small fault, such as a careless hand makes.

    Attributes:
        file: where it is planted, from the repository's root.
        what: what is wrong then, in one line.
        old: text that stands in the file exactly once.
        new: what stands there instead.
        survives: why no quick test finds it; empty if one must.
    """

    file: str
    what: str
    old: str
    new: str
    survives: str = ""

    def planted(self, source: str) -> str:
        """Return a file's text with this fault.

        Raises:
            ValueError: `old` does not stand in it exactly once.
        """
        if (count := source.count(self.old)) != 1:
            raise ValueError(
                f"{self.file}: {self.what!r} replaces a text that stands there {count} times, "
                f"not once: {self.old!r}. Adapt the fault to the code."
            )
        return source.replace(self.old, self.new)


class Area(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Faults in files that the same tests watch over.

    Attributes:
        tests: the quick tests, as pytest takes them.
        fault: the faults.
    """

    tests: list[str]
    fault: list[Fault]


def read_areas() -> dict[str, Area]:
    """Return all areas by name."""
    return {
        path.stem: msgspec.toml.decode(path.read_bytes(), type=Area)
        for path in sorted(FOLDER.glob("*.toml"))
    }
