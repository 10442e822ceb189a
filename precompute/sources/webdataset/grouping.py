"""From the members of a tar to its samples, by WebDataset's rule.

A sample is members side by side whose names share a key: the name up to the first dot of its last
part. The rest is the ending.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from precompute.sources.webdataset.captions import NoCaption, read_caption
from precompute.sources.webdataset.samples import Samples
from precompute.sources.webdataset.tar_headers import Member, members
from precompute.sources.webdataset.wanted import IN_WORDS, ROLES, Role, Wanted, flag_of

JUNK = (".", "__")
MOST_KNOWN_ENDINGS = 1000
Candidate = tuple[int, Member, str]  # how late in its role's list, the member and its ending


def split_name(name: str) -> tuple[str, str]:
    """Return key and ending of a member's name; an empty ending if it has none."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return f"{folder}{slash}{key}", ending


def read_samples(path: Path, tar: str, wanted: Wanted) -> Samples:
    """Return the samples of a tar.

    Args:
        path: of the tar.
        tar: its name in messages.
        wanted: which members are read.

    Raises:
        DamagedTar: it is cut, damaged or compressed.
        OSError: it cannot be read.
    """
    samples = Samples(tar, wanted)
    with path.open("rb", buffering=0) as file:
        grouping = _Grouping(samples, file.fileno())
        for member in members(path):
            grouping.add(member)
        grouping.end_sample()
    _join_parts(samples)
    return samples


class _Grouping:
    """The sample that is being read."""

    def __init__(self, samples: Samples, descriptor: int) -> None:
        self.samples, self.descriptor = samples, descriptor
        self.roles: dict[str, tuple[tuple[Role, int], ...]] = {}
        self.key = ""
        self.candidates: dict[Role, list[Candidate]] = defaultdict(list)
        self.unread: list[tuple[str, str]] = []

    def add(self, member: Member) -> None:
        """Take the next member of the tar."""
        key, ending = split_name(member.name)
        if member.kind == "folder" or member.name.rpartition("/")[2].startswith(JUNK):
            return
        if member.kind == "other" or not ending:
            self.samples.no_members.append(member.name)
            return
        if key != self.key:
            self.end_sample()
            self.key = key
        self.samples.members.add(member.name, ending)
        if ending not in self.roles:
            if len(self.roles) >= MOST_KNOWN_ENDINGS:
                self.roles.clear()
            self.roles[ending] = self.samples.wanted.of_ending(ending)
        for role, rank in self.roles[ending]:
            self.candidates[role].append((rank, member, ending))
        if not self.roles[ending]:
            self.unread.append((member.name, ending))

    def end_sample(self) -> None:
        """Add the sample that was read, if it was one."""
        for name, ending in self.unread:
            self.samples.unread.add(name, ending)
        if self.candidates:
            self._add_sample()
        else:
            self._add_misnamed()
        self.candidates.clear()
        self.unread.clear()

    def _add_sample(self) -> None:
        samples, number = self.samples, len(self.samples.roles)
        found: dict[Role, tuple[Member, str]] = {}
        for role, candidates in self.candidates.items():
            candidates.sort(key=lambda one: one[0])
            if role != "caption":
                found[role] = candidates[0][1:]
            self._note_oddities(role, candidates)
        self._note_image_for_both(found)
        caption = None
        if "caption" in samples.wanted.columns:
            try:
                caption, member, ending = self._caption(self.candidates.get("caption", []))
                found["caption"] = member, ending
            except NoCaption as error:
                samples.no_captions[number] = f"no caption: {error}"
        samples.add(self.key, found, caption)

    def _note_oddities(self, role: Role, candidates: list[Candidate]) -> None:
        """Note members of one role between which nobody has chosen."""
        samples, fault = self.samples, ""
        for (rank, one, _), (other_rank, other, _) in pairwise(candidates):
            if rank == other_rank and one.name == other.name:
                fault = f"{samples.tar} holds {one.name} twice"
            elif rank == other_rank:
                fault = f"{samples.tar} holds both {one.name} and {other.name}"
            elif role != "caption" and not samples.wanted.is_named[role]:
                fault = (
                    f"{samples.tar} holds {one.name} and {other.name}; which is the "
                    f"{IN_WORDS[role]}? Name its ending: {flag_of(role)}"
                )
        if fault:
            samples.faults[len(samples.roles)] = fault

    def _note_image_for_both(self, found: dict[Role, tuple[Member, str]]) -> None:
        """Note a conditioning image that would be the image too, where that one is missing."""
        samples, columns = self.samples, self.samples.wanted.columns
        image, control = found.get("image"), found.get("conditioning_image")
        if image and image == control and columns["image"] != columns["conditioning_image"]:
            samples.faults.setdefault(
                len(samples.roles),
                f"no image: {samples.tar}/{image[0].name} is the conditioning image already",
            )

    def _caption(self, candidates: list[Candidate]) -> tuple[Any, Member, str]:
        """Return the first caption that there is, its member and that's ending.

        Raises:
            NoCaption: there is none; says why.
        """
        samples = self.samples
        reason = f"{samples.tar} has no member {self.key}{samples.wanted.in_words('caption')}"
        for rank, member, ending in candidates:
            data = os.pread(self.descriptor, member.size, member.offset)
            try:
                alternative = samples.wanted.alternatives["caption"][rank]
                return read_caption(data, alternative), member, ending
            except NoCaption as error:
                reason = f"{samples.tar}/{member.name} {error}"
        raise NoCaption(reason)

    def _add_misnamed(self) -> None:
        """Add a faulty sample for each that WebDataset's rule has merged into one without image.

        Of `a.1.jpg` and `a.2.jpg` the key is `a`, and `1.jpg` and `2.jpg` are two endings.
        """
        alternatives = self.samples.wanted.alternatives.values()
        known = {f".{one.ending}" for each in alternatives for one in each}
        longest_first = sorted(known, key=len, reverse=True)
        first: dict[str, str] = {}
        for name, ending in self.unread:
            for tail in longest_first:
                if ending.lower().endswith(tail):
                    first.setdefault(ending[: -len(tail)], name)
                    break
        for name in first.values():
            self.samples.faults[len(self.samples.roles)] = (
                f"{self.samples.tar}/{name}: a sample's key ends at the first dot of the name, by "
                f"WebDataset's rule, so that this is a member of {self.key!r}; rename it"
            )
            self.samples.add(self.key, {})


def _join_parts(samples: Samples) -> None:
    """Make one faulty sample of several that have one key, and all members only together."""
    numbers = range(len(samples.roles))
    hashes = np.fromiter((_hash(samples.keys[number]) for number in numbers), np.uint64)
    values, counts = np.unique(hashes, return_counts=True)
    if (counts < 2).all():
        return
    same: dict[int, list[int]] = defaultdict(list)
    for number in np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist():
        if number not in samples.faults:
            same[int(hashes[number])].append(number)
    all_roles = sum(1 << ROLES.index(role) for role in samples.wanted.columns)
    dropped: set[int] = set()
    for alike in same.values():
        parts = [number for number in alike if samples.roles[number] != all_roles]
        if _union(samples.roles[number] for number in parts) == all_roles:
            dropped.update(parts[1:])
            samples.faults[parts[0]] = (
                f"the members of {samples.keys[parts[0]]} are not side by side in {samples.tar}: "
                "sort the tar by name"
            )
            alike = [number for number in alike if number not in parts]
        samples.num_again += max(0, len(alike) - 1)
    if dropped:
        samples.keep([number for number in numbers if number not in dropped])


def _hash(key: str) -> int:
    return xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))


def _union(bits: Iterable[int]) -> int:
    together = 0
    for one in bits:
        together |= one
    return together
