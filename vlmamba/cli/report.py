"""``vlmamba report FOLDER``: one page about the runs in a folder, and the same figures in the terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vlmamba.errors import ConfigError, MissingFileError


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba report",
        description="Write report.html about the runs of a folder (runs/quickstart holds pretrain and finetune): "
        "scores, losses, times, settings, and answers with their pictures.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", help="a run, or a folder of runs")
    parser.add_argument("--output", help="the page (default: FOLDER/report.html)")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--time",
        action="append",
        default=[],
        metavar="WHAT=SECONDS",
        help="further row of the time table (repeatable)",
    )
    arguments = parser.parse_args(words)
    from vlmamba.evaluation.report import write_report
    from vlmamba.evaluation.tables import duration, format_results, format_runs, read_run, text_table

    folder = Path(arguments.folder)
    runs = [read_run(path) for path in find_runs(folder)]
    results = find_results(folder)
    timings = [_timing(text) for text in arguments.time]
    page = write_report(
        arguments.output or folder / "report.html",
        title=arguments.title or f"vlmamba: {folder.name}",
        runs=runs,
        results=results,
        timings=timings,
    )
    print(format_runs(runs))
    if results is not None:
        print("\n" + format_results(json.loads(results.read_text(encoding="utf-8"))))
    if timings:
        print("\n" + text_table(["time", ""], [[what, duration(seconds)] for what, seconds in timings]))
    print(f"\nreport: {page}")
    return 0


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs in it, oldest first.

    Raises:
        MissingFileError: There is none.
    """
    if (folder / "log.jsonl").is_file():
        return [folder]
    logs = sorted(folder.glob("*/log.jsonl"), key=lambda p: (p.parent / "config.yaml").stat().st_mtime)
    if not logs:
        raise MissingFileError(
            f"no run in {folder}: neither {folder}/log.jsonl nor {folder}/*/log.jsonl is there"
        )
    return [log.parent for log in logs]


def find_results(folder: Path) -> Path | None:
    """The newest ``results.json`` of an evaluation in a run or a folder of runs."""
    found = [*folder.glob("eval/results.json"), *folder.glob("*/eval/results.json")]
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def _timing(text: str) -> tuple[str, float]:
    what, _, seconds = text.rpartition("=")
    try:
        return what, float(seconds)
    except ValueError as error:
        raise ConfigError(f"--time takes WHAT=SECONDS, got {text!r}") from error
