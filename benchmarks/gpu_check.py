"""Everything worth knowing about vlmamba on a GPU, in under eight minutes:  bash scripts/gpu_check.sh [PIECE ...]

    parity   every GPU backend against a float64 reference, fp32 and bf16, every feature; the same bits twice
    scan     times of the scan at the language model's and Q-Mamba's sizes, L = 930 and 8192, packed or not
    layer    times of a whole Mamba layer over its four projections
    train    a stage-2 step of VL-Mamba-2.8B with random weights: tokens/s, MFU, memory
    decode   prefill and decoding of Mamba-2.8B, with and without CUDA graphs

All by default. Each piece runs in a process of its own with a time limit, so a crash, a hang or an empty memory of one
hides no other, and rows that were ready are kept. Needs torch >= 2.11 and transformers, no network, no data; what
else is installed (triton, mamba-ssm) is measured. Writes `gpu_check.json` and `gpu_check.md`, the table for
docs/benchmarks.md. Exit status: 0 all well, 1 a check failed or a piece broke, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

BUDGETS = {"parity": 110, "scan": 80, "layer": 60, "train": 120, "decode": 90}
"""Seconds a piece may take, start-up and compilation included; together under eight minutes."""
GRACE = 8
"""Seconds before its limit at which a piece should stop by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pieces, each in its own process, and write the report."""
    options = _parse(argv)
    if options.inside:
        return run_inside(options)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("gpu_check: no CUDA device here (rehearse with --device cpu --tiny)", file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    pieces = [run_piece(name, options) for name in options.pieces or BUDGETS]
    record = pieces[0].pop("environment", {}) if pieces else {}
    for piece in pieces:
        record = record or piece.get("environment", {})
        piece.pop("environment", None)
    report = {"environment": record, "pieces": pieces}
    (options.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report)
    (options.out / "gpu_check.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{options.out / 'gpu_check.json'}, {options.out / 'gpu_check.md'}")
    return 0 if all(piece["ok"] for piece in pieces) else 1


def _parse(argv: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="gpu_check"
    )
    parser.add_argument("pieces", nargs="*", help=f"{', '.join(BUDGETS)}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="where the reports go")
    parser.add_argument("--budget", type=float, default=1.0, help="factor on every piece's time limit")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = sorted(set(options.pieces) - BUDGETS.keys())
    if unknown:
        parser.error(f"unknown piece {unknown[0]!r}; there are {', '.join(BUDGETS)}")
    return options


def run_piece(name: str, options: Any, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a piece in its own process; what it found, whether or not it came to its end.

    Args:
        name: The piece.
        options: As parsed.
        command: What is run instead of this program (tests).
    """
    limit = BUDGETS[name] * options.budget
    rows_file = options.out / f"{name}.jsonl"
    rows_file.unlink(missing_ok=True)
    command = command or [sys.executable, str(Path(__file__).resolve())]
    words = [*command, name, "--inside", "--device", options.device, "--out", str(options.out)]
    words += ["--budget", str(options.budget), *(["--tiny"] if options.tiny else [])]
    print(f"gpu_check: {name} (at most {limit:.0f} s) ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    log = options.out / f"{name}.log"
    problem = ""
    with log.open("w", encoding="utf-8") as stream:
        try:
            done = subprocess.run(words, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s; what is below was ready by then"
        else:
            if done.returncode:
                problem = f"ended with status {done.returncode}: {_last_line(log)} (all of it: {log})"
    rows, environment = _read(rows_file)
    failed = [row for row in rows if not row["ok"]]
    return {
        "piece": name,
        "ok": not problem and not failed and bool(rows),
        "seconds": round(time.monotonic() - started, 1),
        "problem": problem or ("" if rows else "found nothing to measure"),
        "failed": len(failed),
        "rows": rows,
        "environment": environment,
    }


def run_inside(options: Any) -> int:
    """The piece itself: one JSON line a row, written as soon as it is known."""
    started = time.monotonic()
    from _common import environment

    (name,) = options.pieces
    limit = BUDGETS[name] * options.budget
    with (options.out / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"environment": environment(options.device)}) + "\n")
        stream.flush()
        from _gpu_ops import Setting

        setting = Setting(options.device, options.tiny, started + limit - GRACE)
        for row in piece_function(name)(setting):
            stream.write(json.dumps(asdict(row)) + "\n")
            stream.flush()
    return 0


def piece_function(name: str) -> Callable[[Any], Iterator[Any]]:
    """The generator of a piece's rows."""
    import _gpu_model
    import _gpu_ops

    functions: dict[str, Callable[[Any], Iterator[Any]]] = {
        "parity": _gpu_ops.parity,
        "scan": _gpu_ops.scan,
        "layer": _gpu_ops.layer,
        "train": _gpu_model.train,
        "decode": _gpu_model.decode,
    }
    return functions[name]


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows and environment; a line cut off by a kill is left out."""
    rows, environment = [], {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            break
        if "environment" in found:
            environment = found["environment"]
        else:
            rows.append(found)
    return rows, environment


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no message"


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown; parity as one line a backend, and every failure in full."""
    record = report["environment"]
    machine = record.get("gpu") or record.get("cpu", "unknown machine")
    versions = ", ".join(
        f"{k} {record[k]}" for k in ("torch", "triton", "transformers", "mamba_ssm") if record.get(k)
    )
    lines = [
        "## GPU check",
        "",
        f"    bash scripts/gpu_check.sh   # {record.get('date', '')[:10]}, {machine}, {versions}",
    ]
    for piece in report["pieces"]:
        state = "ok" if piece["ok"] else "NOT OK"
        lines += ["", f"### {piece['piece']}: {state}, {piece['seconds']} s"]
        if piece["problem"]:
            lines += ["", f"**{piece['problem']}**"]
        rows = piece["rows"]
        lines += ["", *(_parity_table(rows) if piece["piece"] == "parity" else _table(rows))] if rows else []
        failures = [row for row in rows if not row["ok"]]
        if failures and piece["piece"] == "parity":
            lines += [
                "",
                *(f"- {row['case']}, {row['name']}: {row['text']} {row['values']}" for row in failures[:20]),
            ]
    return "\n".join(lines) + "\n"


def _parity_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Largest error and number of failures by operation, dtype and backend."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kind = " ".join(row["case"].split()[:2]) if "bits" not in row["case"] else row["case"]
        groups.setdefault((kind, row["name"]), []).append(row)
    lines = ["| check | backend | cases | not served | failed | largest error |", "|---|---|---|---|---|---|"]
    for (kind, name), found in groups.items():
        errors = [row["values"]["error"] for row in found if "error" in row["values"]]
        refused = sum(row["ok"] and not row["values"] for row in found)
        failed = sum(not row["ok"] for row in found)
        worst = f"{max(errors):.1e}" if errors else ""
        lines.append(f"| {kind} | {name} | {len(found)} | {refused} | {failed} | {worst} |")
    return lines


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row["values"]))
    lines = ["| case | what | " + " | ".join([*columns, "remark"]) + " |", "|---" * (len(columns) + 3) + "|"]
    for row in rows:
        cells = [f"{row['values'][c]:,.4g}" if c in row["values"] else "" for c in columns]
        remark = row["text"] if row["ok"] else f"FAILED: {row['text']}"
        lines.append("| " + " | ".join([row["case"], row["name"], *cells, remark]) + " |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
