"""What is said about tars: what of them is not read, and why they cannot be used at all."""

from collections import Counter
from collections.abc import Sequence

from common.errors import ConfigError
from precompute.sources.counted import first_few
from precompute.sources.source import printable
from precompute.sources.webdataset.samples import Samples
from precompute.sources.webdataset.wanted import IMAGES, IN_WORDS, Role, Wanted, flag_of

TEXTS = {"txt", "caption", "text", "json"}
DOT_RULE = "a sample's key ends at the first dot of the name, by WebDataset's rule"


def unread_remarks(all_samples: Sequence[Samples]) -> list[str]:
    """Return a line each for what of the tars is not read, with counts."""
    remarks = []
    endings: Counter[str] = Counter()
    dotted = ""
    for samples in all_samples:
        endings.update(samples.unread.endings)
        with_dot = next(
            (name for ending, name in samples.unread.first.items() if "." in ending), ""
        )
        dotted = dotted or (f"{samples.tar}/{printable(with_dot)}" if with_dot else "")
    if endings:
        rule = f"; {DOT_RULE}: {dotted}" if dotted else ""
        remarks.append(f"not read: {endings.total()} members, {_counted(endings)}{rule}")
    others = [
        f"{samples.tar}/{printable(name)}" for samples in all_samples for name in samples.no_members
    ]
    if others:
        remarks.append(
            f"not read: {len(others)} links and names without ending: {first_few(others)}"
        )
    again = {samples.tar: samples.num_again for samples in all_samples if samples.num_again}
    if again:
        remarks.append(
            f"{sum(again.values())} samples have the key of an earlier one in their tar, and are "
            f"rows like any other: {first_few(list(again))}"
        )
    return remarks


def refuse_useless(all_samples: Sequence[Samples], wanted: Wanted, where: str) -> None:
    """Refuse tars of which no sample can be used.

    Raises:
        ConfigError: says what to do.
    """
    if not sum(map(len, all_samples)):
        endings = _counted(_endings(all_samples))
        raise ConfigError(f"{where}: no samples in it. Names are KEY.ENDING; it has {endings}.")
    faults = [fault for samples in all_samples for fault in samples.faults.values()]
    if len(faults) == sum(map(len, all_samples)):
        raise ConfigError(f"{where}: no sample of {len(faults)} can be used. {faults[0]}.")
    for role in wanted.columns:
        if not any(samples.count(role) for samples in all_samples):
            raise ConfigError(
                f"{where}: no {IN_WORDS[role]} in it: {_no_role(role, all_samples, wanted)}"
            )


def _no_role(role: Role, all_samples: Sequence[Samples], wanted: Wanted) -> str:
    """Return why no sample has a role, and what to do."""
    reason = next((one for samples in all_samples for one in samples.no_captions.values()), "")
    taken = {one.ending for each in wanted.alternatives.values() for one in each}
    endings = _endings(all_samples)
    if role == "caption" and taken & endings.keys() & TEXTS:
        return f"{reason.removeprefix('no caption: ')}. {flag_of(role)} names another."
    likely = [
        ending
        for ending in endings
        if ending not in taken
        and (ending.rpartition(".")[2] in IMAGES if role != "caption" else ending in TEXTS)
    ]
    hint = f"Did you mean {flag_of(role)} {likely[0]}?" if len(likely) == 1 else ""
    return (
        f"no member ends in {wanted.in_words(role)}; they end in {_counted(endings)}. "
        f"{hint or f'Name the ending: {flag_of(role)}.'}"
    )


def _endings(all_samples: Sequence[Samples]) -> Counter[str]:
    endings: Counter[str] = Counter()
    for samples in all_samples:
        endings.update(samples.members.endings)
    return endings


def _counted(endings: Counter[str]) -> str:
    """Return the most frequent endings, each with its number of members."""
    counts = [f".{printable(ending)} ({count})" for ending, count in endings.most_common()]
    return first_few(counts) if counts else "nothing"
