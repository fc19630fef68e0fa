"""What a run of `prepare` did."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from voco_jax.data.cache import ASIDE, EXCLUDED, FAILURES
from voco_jax.data.formats.stored import Aside
from voco_jax.files import printable

SHOWN = 20  # names that are printed


def some(names: Sequence[str]) -> str:
    """Some of many names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def pruned_line(ids: Sequence[str]) -> str:
    """What to say about volumes that were taken out of a cache."""
    return (
        f"taken out of the cache: {len(ids)} volumes: {some(ids)}; a run that began with them goes "
        "on, but cannot be resumed once it has stopped"
    )


@dataclass(frozen=True)
class Failure:
    """A volume that is not in the cache, and why: a line of failures.jsonl."""

    id: str
    path: str
    reason: str  # a few fixed words, a colon, details

    def line(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    cache: str
    total: int  # volumes asked for
    done: int  # prepared by this run
    skipped: int  # already there
    failed: int
    failures: tuple[Failure, ...]  # sorted by id
    training: int  # volumes in the cache now
    validation: int
    unlisted: int  # of these, not asked for
    doubtful: int  # of these, taken though they are hardly images of the chain's kind
    aside: tuple[Aside, ...]  # files that are no part of a volume
    files_taken: int  # of the volumes that are there
    files_failed: int
    size: int | None  # of the cache's volumes, bytes; None: in an object store
    shared_series: tuple[str, ...]  # ids of volumes whose DICOM series is in several folders
    divided: int = 0  # folders with several DICOM volumes
    parts: int = 0  # these volumes
    excluded: int = 0  # volumes that were found and are not wanted
    excluded_before: int = 0  # of these, by the cache's excluded.txt alone
    files_excluded: int = 0
    excluded_there: int = 0  # excluded volumes in the cache
    pruned: tuple[str, ...] = ()  # ids of volumes that were taken out of the cache
    unused: str = ""  # what the file of excluded volumes names in vain
    seconds: float = 0.0

    def __str__(self) -> str:
        """The lines that the command prints."""
        lines = [
            f"cache {self.cache}: {self.training} training and {self.validation} validation "
            "volumes" + (f", {self.size / 1e9:.2f} GB" if self.size is not None else ""),
            f"asked for {self.total}: {self.done} prepared now, {self.skipped} already there, "
            f"{self.failed} failed; {self.seconds:.1f} s"
            + (f", {self.done / self.seconds:.2f} volumes/s" if self.done else ""),
        ]
        if self.divided:
            lines.append(
                f"{self.divided} folders hold several DICOM series: taken as {self.parts} volumes; "
                "--dry-run shows them, --series and --one-series choose"
            )
        if self.excluded:
            lines.append(f"excluded: {self.excluded} volumes")
        if self.excluded_before:
            lines.append(
                f"{self.excluded_before} of them by {self.cache}/{EXCLUDED}, where --prune put "
                "them: delete a volume's line to take it in again"
            )
        if self.pruned:
            lines.append(pruned_line(self.pruned))
        if self.excluded_there:
            lines.append(
                f"{self.excluded_there} excluded volumes are in the cache, and training uses them: "
                "add --prune to take them out"
            )
        if unlisted := self.unlisted - self.excluded_there:
            lines.append(
                f"{unlisted} volumes of the cache are in none of the lists given; training "
                "uses them too: add --prune to take them out"
            )
        if self.unused:
            lines.append(self.unused)
        if self.shared_series:
            lines.append(
                f"{len(self.shared_series)} volumes have a DICOM series that is in several folders "
                f"({some(self.shared_series[:2])} ...): copies, or parts of one scan: put the "
                "files of each series into one folder"
            )
        if self.doubtful:
            lines.append(f"{self.doubtful} volumes of the cache are doubtful (--take-doubtful)")
        reasons = collections.Counter(failure.reason.split(":")[0] for failure in self.failures)
        lines += [f"failed, {reason}: {count}" for reason, count in reasons.most_common()]
        if self.failures:
            lines.append(f"each failed volume with its reason: {self.cache}/{FAILURES}")
        reasons = collections.Counter(why.split(":")[0] for _, why in self.aside)
        lines += [f"set aside, {reason}: {count} files" for reason, count in reasons.most_common()]
        if self.aside or self.excluded:
            total = self.files_taken + self.files_failed + self.files_excluded + len(self.aside)
            excluded = f"{self.files_excluded} of excluded ones, " if self.excluded else ""
            lines.append(
                f"{total} files: {self.files_taken} of volumes taken, {self.files_failed} of "
                f"failed ones, {excluded}"
                f"{len(self.aside)} set aside, each with its reason: {self.cache}/{ASIDE}"
            )
        return "\n".join(lines)


def aside_line(file: Aside) -> str:
    """A file that was set aside, as JSON."""
    return json.dumps({"file": printable(file[0]), "reason": file[1]})
