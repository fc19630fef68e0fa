"""What a run of `prepare` did."""

import collections
import dataclasses
import json
from dataclasses import dataclass

from voco_jax.data.cache import FAILURES


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
    size: int | None  # of the cache's volumes, bytes; None: in an object store
    seconds: float

    def __str__(self) -> str:
        """The lines that the command prints."""
        lines = [
            f"cache {self.cache}: {self.training} training and {self.validation} validation "
            "volumes" + (f", {self.size / 1e9:.2f} GB" if self.size is not None else ""),
            f"asked for {self.total}: {self.done} prepared now, {self.skipped} already there, "
            f"{self.failed} failed; {self.seconds:.1f} s"
            + (f", {self.done / self.seconds:.2f} volumes/s" if self.done else ""),
        ]
        if self.unlisted:
            lines.append(
                f"{self.unlisted} volumes of the cache are in none of the lists given; training "
                "uses them too: to leave them out, prepare into another folder"
            )
        reasons = collections.Counter(failure.reason.split(":")[0] for failure in self.failures)
        lines += [f"failed, {reason}: {count}" for reason, count in reasons.most_common()]
        if self.failures:
            lines.append(f"each failed volume with its reason: {self.cache}/{FAILURES}")
        return "\n".join(lines)
