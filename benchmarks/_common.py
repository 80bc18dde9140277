"""What the benchmarks share: timing in turns, ratios with their spread, the record of the machine, JSON, tables, plots.

Contenders run in turns within one process, so a machine that gets busy slows all of them; what is reported are
ratios of neighbouring runs, with median and quartiles. Nothing is timed before `check_same` has found that the
contenders compute the same thing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


class DisagreementError(RuntimeError):
    """Two contenders compute different things: a comparison of their times would mean nothing."""


@dataclass
class Timing:
    """Seconds of one contender, one entry a round (its rounds only: slow ones run fewer)."""

    name: str
    seconds: list[float] = field(default_factory=list)

    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile."""
        return quartiles(self.seconds)


@dataclass
class Case:
    """The measured contenders of one comparison.

    Attributes:
        title: What was done and at which size.
        unit: What `work` counts, for a rate ("tokens"), or "" for none.
        work: Units of work in one run.
        baseline: The contender that ratios are taken against.
        timings: By contender.
        errors: Largest relative error against the oracle, by contender.
        notes: Sentences for the reader.
    """

    title: str
    baseline: str
    timings: dict[str, Timing]
    unit: str = ""
    work: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Quartiles of time(name) / time(baseline) over the rounds both ran."""
        pairs = zip(self.timings[name].seconds, self.timings[self.baseline].seconds, strict=False)
        return quartiles([a / b for a, b in pairs])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, by linear interpolation.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no value was measured")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.25), at(0.5), at(0.75)


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_once(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds of one run, as the mean of `repeats` in a row."""
    synchronise(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return (time.perf_counter() - started) / repeats


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 9,
    device: str = "cpu",
    sample_seconds: float = 0.02,
    budget: float = 20.0,
) -> dict[str, Timing]:
    """Time contenders in turns, each round in another order.

    Args:
        contenders: What to run, by name.
        rounds: Rounds in which all run.
        device: Whose work is waited for.
        sample_seconds: Short runs are repeated until a sample takes about as long as this.
        budget: Seconds a contender may take in all; a slow one sits out the later rounds (it runs once at least).

    Returns:
        The timings, by name.
    """
    timings = {name: Timing(name) for name in contenders}
    repeats: dict[str, int] = {}
    spent = dict.fromkeys(contenders, 0.0)
    for name, run in contenders.items():  # also the warm-up
        first = time_once(run, 1, device)
        if first < budget / 2:
            first = time_once(run, 1, device)
            repeats[name] = max(1, round(sample_seconds / max(first, 1e-7)))
        else:  # so slow that its first run has to count
            repeats[name] = 1
            timings[name].seconds.append(first)
            spent[name] = budget
    names = list(contenders)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if spent[name] >= budget:
                continue
            seconds = time_once(contenders[name], repeats[name], device)
            timings[name].seconds.append(seconds)
            spent[name] += seconds * repeats[name]
    return timings


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest deviation over the largest value; NaN where either is not finite."""
    if got.numel() == 0:
        return 0.0
    scale = want.double().abs().max().clamp(min=1e-30)
    return float((got.double() - want.double()).abs().max() / scale)


def check_same(
    case: str, name: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float
) -> float:
    """The largest relative error of a contender's results.

    Args:
        case: What is compared, for the message.
        name: The contender.
        got: Its values and gradients by name.
        want: The oracle's; every one of them must be in `got` with the same shape.
        tolerance: Largest error accepted.

    Raises:
        DisagreementError: A result is missing, has another shape or another value.
    """
    worst = 0.0
    for key, right in want.items():
        if key not in got:
            raise DisagreementError(f"{case}: {name} gives no {key!r}, so nothing of this case is timed.")
        if got[key].shape != right.shape:
            raise DisagreementError(
                f"{case}: {name}'s {key} has shape {tuple(got[key].shape)}, the oracle's {tuple(right.shape)}."
            )
        error = relative_error(got[key].detach().cpu(), right.detach().cpu())
        if not error <= tolerance:
            raise DisagreementError(
                f"{case}: {name} does not compute the same thing: {key} is off by {error:.1e} (relative to the "
                f"largest value), {tolerance:.0e} is allowed. Nothing of this case is timed."
            )
        worst = max(worst, error)
    return worst


def environment(device: str, threads: int | None = None) -> dict[str, Any]:
    """What a figure depends on: processor, versions, threads, date, load, command."""
    record: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python", *[Path(sys.argv[0]).name, *sys.argv[1:]]]),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "commit": _commit(),
    }
    for package in ("transformers", "triton", "mamba_ssm", "causal_conv1d", "mambapy"):
        record[package] = _version(package)
    if device.startswith("cuda"):
        record["gpu"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
    return record


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, cases: Sequence[Case], record: Mapping[str, Any]) -> None:
    """All seconds of all rounds with the record of the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": dict(record), "cases": [asdict(case) for case in cases]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def seconds_text(seconds: float) -> str:
    """A duration with three figures and its unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError(seconds)


def table(case: Case) -> str:
    """A case as a Markdown table, fastest contender first."""
    head = ["contender", "median", f"time / {case.baseline}", "quartiles"]
    if case.unit:
        head.insert(2, f"{case.unit}/s")
    extras = list(dict.fromkeys(key for values in case.extra.values() for key in values))
    head += extras
    if case.errors:
        head.append("error")
    rows = [head, ["---"] * len(head)]
    for timing in sorted(case.timings.values(), key=lambda one: one.quartiles()[1]):
        low, ratio, high = case.ratio(timing.name)
        median = timing.quartiles()[1]
        row = [timing.name, seconds_text(median), f"{ratio:.2f}", f"{low:.2f} – {high:.2f}"]
        if case.unit:
            row.insert(2, f"{case.work / median:,.1f}")
        mine = case.extra.get(timing.name, {})
        row += [f"{mine[key]:.3g}" if key in mine else "" for key in extras]
        if case.errors:
            row.append(f"{case.errors[timing.name]:.0e}" if timing.name in case.errors else "")
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"### {case.title}", "", *lines, *(f"\n{note}" for note in case.notes)])


def plot(path: Path, cases: Sequence[Case], record: Mapping[str, Any]) -> bool:
    """One row of bars a case, logarithmic, quartiles as whiskers; False where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = sum(len(case.timings) + 2 for case in cases)
    figure = Figure(figsize=(9, 0.28 * rows + 1))
    FigureCanvasAgg(figure)
    heights = [len(case.timings) + 1 for case in cases]
    axes = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        ordered = sorted(case.timings.values(), key=lambda one: -one.quartiles()[1])
        for place, timing in enumerate(ordered):
            low, median, high = timing.quartiles()
            colour = "#3b6fb6" if timing.name == case.baseline else "#b9c4d3"
            axis.barh(place, median, xerr=[[median - low], [high - median]], color=colour)
            axis.text(high * 1.05, place, f" {case.ratio(timing.name)[1]:.2f}x", va="center", fontsize=7)
        axis.set_yticks(range(len(ordered)), [timing.name for timing in ordered], fontsize=8)
        axis.set_xscale("log")
        axis.set_title(case.title, fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(x=0.12)
    axes[-1].set_xlabel("seconds (median, quartiles); numbers are times of the blue one", fontsize=8)
    machine = record.get("gpu") or record["cpu"]
    figure.suptitle(f"{machine}, {record['threads']} threads, {record['date'][:10]}", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: a minute or so")
    parser.add_argument("--threads", type=int, help="torch threads; all cores by default")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks") / name, help="where JSON and plot go"
    )
    return parser


def finish(name: str, out: Path, cases: Sequence[Case], record: dict[str, Any]) -> None:
    """Print the tables, write JSON and plot."""
    record["load_at_end"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    for case in cases:
        print(f"\n{table(case)}")
    write_json(out / f"{name}.json", cases, record)
    drawn = plot(out / f"{name}.png", cases, record) if cases else False
    print(
        f"\n{out / f'{name}.json'}"
        + (f", {out / f'{name}.png'}" if drawn else " (no plot: matplotlib is missing)")
    )
