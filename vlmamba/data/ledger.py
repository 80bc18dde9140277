"""The account of rows that could not be used: counted, listed, and limited by a budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmamba.common.files import append_text
from vlmamba.errors import DataError

FREE_KINDS = frozenset({"too_long"})
"""Kinds that are listed but never use up the budget: dropping them is a rule, not a fault of the data."""


class BadSamples:
    """Rows that were skipped, each counted once, until there are too many.

    The budget is ``max_bad_fraction`` of all rows; so that one bad file does not stop a small run, up to
    eight rows are always allowed, but never more than a tenth of the rows. ``max_bad_fraction=0`` allows
    none.

    Args:
        total_rows: Rows of the data set.
        max_bad_fraction: The budget.
        path: A file that receives one JSON object a bad row (``bad_samples.jsonl`` of a run); None for none.
    """

    def __init__(self, total_rows: int, max_bad_fraction: float = 0.001, path: Path | None = None) -> None:
        self.total_rows = total_rows
        self.max_bad_fraction = max_bad_fraction
        self.path = path
        free = min(8, total_rows // 10) if max_bad_fraction > 0 else 0
        self.allowed = max(int(max_bad_fraction * total_rows), free)
        self.records: dict[int, dict[str, Any]] = {}
        self.kinds: Counter[str] = Counter()
        self._listed = _listed(path)

    @property
    def count(self) -> int:
        """Rows skipped so far, those outside the budget included."""
        return len(self.records)

    @property
    def charged(self) -> int:
        """Rows that count against the budget."""
        return sum(n for kind, n in self.kinds.items() if kind not in FREE_KINDS)

    def add(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Take over the bad rows of a batch (`index`, `id`, `where`, `kind`, `reason` each).

        Returns:
            How many of them were new.

        Raises:
            DataError: The budget is used up; the message has the counts and the first rows.
        """
        new = []
        for record in records:
            if record["index"] not in self.records:
                self.records[record["index"]] = dict(record)
                self.kinds[record["kind"]] += 1
                new.append(record)
        unlisted = [record for record in new if record["index"] not in self._listed]
        if unlisted and self.path is not None:
            append_text(self.path, "".join(json.dumps(dict(record)) + "\n" for record in unlisted))
        if new and self.charged > self.allowed:
            raise DataError(self.message())
        return len(new)

    def message(self) -> str:
        """What is wrong, in counts and examples."""
        charged = [r for r in self.records.values() if r["kind"] not in FREE_KINDS]
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common() if kind not in FREE_KINDS)
        examples = "\n".join(f"  {r['where']} (id {r['id']!r}): {r['reason']}" for r in charged[:5])
        listed = f" All are listed in {self.path}." if self.path is not None else ""
        return (
            f"{len(charged)} of {self.total_rows} rows cannot be used ({kinds}), more than the "
            f"{self.allowed} that max_bad_fraction={self.max_bad_fraction} allows. The first of them:\n"
            f"{examples}\n"
            f"Repair the data (`vlmamba data check` lists every problem) or raise data.max_bad_fraction.{listed}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The account so far."""
        return {"records": list(self.records.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an account (nothing is written to the file again)."""
        self.records = {int(r["index"]): dict(r) for r in state["records"]}
        self.kinds = Counter(r["kind"] for r in self.records.values())


def _listed(path: Path | None) -> set[int]:
    """The rows that the file lists already (a resumed run goes on with it); half a line does not count."""
    if path is None or not path.is_file():
        return set()
    found = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.add(int(json.loads(line)["index"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found
