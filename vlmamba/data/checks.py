"""Look at every row and picture of a data set before a run does, and list what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from vlmamba.common.files import replaced
from vlmamba.data.downloads import download_hint
from vlmamba.data.encode import SampleEncoder, open_pictures
from vlmamba.data.index import JSONL_SUFFIXES
from vlmamba.data.lengths import in_chunks
from vlmamba.data.sources import LLaVASource, read_row
from vlmamba.data.types import RowError, Source
from vlmamba.errors import ConfigError

_PIECE = 64


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row."""

    source: str
    row: int
    where: str
    id: str | int | None
    kind: str
    reason: str


@dataclass
class CheckReport:
    """What `check` found.

    Attributes:
        rows: Rows looked at.
        images: Pictures decoded.
        problems: Rows that cannot be used.
        events: What is repaired on the fly, name -> count (`vlmamba.data.conversation` and
            "image_suffix_replaced").
        examples: The first places of each event.
    """

    rows: int = 0
    images: int = 0
    problems: list[Problem] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are rows, and all can be used."""
        return not self.problems

    def note(self, events: Sequence[str], where: str) -> None:
        """Count repairs of a row."""
        for event in events:
            self.events[event] += 1
            places = self.examples.setdefault(event, [])
            if len(places) < 3 and where not in places:
                places.append(where)

    def take(self, other: CheckReport) -> None:
        """Add what another report found."""
        self.rows += other.rows
        self.images += other.images
        self.problems += other.problems
        self.events.update(other.events)
        for event, found in other.examples.items():
            places = self.examples.setdefault(event, [])
            places += [place for place in found if place not in places][: 3 - len(places)]

    def text(self, limit: int = 50) -> str:
        """The report for people; names that are no text are shown with their codes."""
        kinds = Counter(problem.kind for problem in self.problems)
        rows = len({(problem.source, problem.row) for problem in self.problems if problem.row >= 0})
        lines = [f"{self.rows} rows, {self.images} images, {rows} rows that cannot be used"]
        lines += [f"  {count} {kind}" for kind, count in kinds.most_common()]
        if self.events:
            lines.append("repaired while reading:")
            lines += [
                f"  {n} {event} (e.g. {', '.join(self.examples[event])})"
                for event, n in self.events.most_common()
            ]
        lines += [f"{p.where} (id {p.id!r}): {p.reason}" for p in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"... and {len(self.problems) - limit} more")
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def check(
    sources: Sequence[Source] | Source,
    *,
    encoder: SampleEncoder | None = None,
    decode: bool = True,
    limit: int | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> CheckReport:
    """Read every row of every source and decode every picture, as training does.

    Args:
        sources: One source or several.
        encoder: Also tokenise the rows, as training would: only so are lengths and the chat template looked at.
        decode: False: open no picture.
        limit: Look at so many rows of each source only.
        num_workers: Processes that share the work; 0 does it in this one.
        progress: Show a progress bar.
    """
    report = CheckReport()
    many: Sequence[Source] = sources if isinstance(sources, list | tuple) else [sources]  # type: ignore[list-item]
    for source in many:
        count = len(source) if limit is None else min(limit, len(source))
        if not len(source):
            report.problems.append(Problem(source.name, -1, source.name, None, "empty", "there are no rows"))
        work = partial(_check_rows, source, encoder, decode)
        title = f"checking {source.name}"
        for piece in in_chunks(
            work, count, size=_PIECE, num_workers=num_workers, title=title, progress=progress
        ):
            report.take(piece)
    return report


def _check_rows(source: Source, encoder: SampleEncoder | None, decode: bool, rows: range) -> CheckReport:
    report = CheckReport()
    for row in rows:
        report.rows += 1
        where = ""
        events: list[str] = []
        problems: list[RowError] = []
        try:
            sample = read_row(source, row)
            where, images, events = sample.where, sample.images, list(sample.events)
            if encoder is not None:
                fitted = encoder.fit(encoder.place(sample))
                images, events = fitted.images, [*events, *fitted.events]
            for image in images if decode else ():
                try:
                    open_pictures(sample, [image], events)
                    report.images += 1
                except RowError as error:  # and look at the others
                    problems.append(error)
        except RowError as error:
            problems.append(error)
        report.problems += [Problem(source.name, row, e.where, e.id, e.kind, e.reason) for e in problems]
        report.note(events, where)
    return report


def write_clean(source: LLaVASource, report: CheckReport, path: Path) -> int:
    """Write the annotations without the rows that cannot be used, every other row byte for byte as it was.

    Args:
        source: What was checked, all of it.
        report: What was found.
        path: The file to write; JSON lines if its name says so, else a JSON list.

    Returns:
        How many rows are in it.

    Raises:
        ConfigError: The file is there already.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already; name another file for the cleaned annotations")
    bad = {problem.row for problem in report.problems if problem.source == source.name}
    lines = path.suffix.lower() in JSONL_SUFFIXES
    kept = 0
    with replaced(path) as unfinished, unfinished.open("wb") as file:
        file.write(b"" if lines else b"[")
        for row in range(len(source)):
            if row in bad:
                continue
            raw = source.rows.raw(row).strip()
            between = b"" if lines else (b",\n" if kept else b"\n")
            file.write(between + (raw.replace(b"\n", b" ") + b"\n" if lines else raw))
            kept += 1
        file.write(b"" if lines else b"\n]\n")
    return kept


def missing_folders(source: Source, *, rows: int = 2000) -> dict[Path, str | None]:
    """Folders that rows name images in and that are not there, with where they can be had.

    Args:
        source: The source.
        rows: How many rows to look at, evenly spread.
    """
    folders: set[Path] = set()
    for row in np.unique(np.linspace(0, len(source) - 1, min(rows, len(source))).astype(int)):
        try:
            sample = read_row(source, int(row))
        except RowError:
            continue
        folders.update(ref.parent for ref in sample.images if isinstance(ref, Path))
    return {folder: download_hint(folder) for folder in sorted(folders) if not folder.is_dir()}
