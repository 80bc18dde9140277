"""The benchmark of the harness runs, and refuses to time what differs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture()
def program(monkeypatch):
    """``benchmarks/eval.py`` under another name than the folder of tasks has."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_eval", BENCHMARKS / "eval.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_eval", module)
    spec.loader.exec_module(module)
    return module


def test_both_comparisons_are_made(program, tmp_path, capsys):
    words = ["--quick", "--questions", "5", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    assert program.main(words) == 0
    cases = json.loads((tmp_path / "eval.json").read_text())["cases"]
    assert [sorted(case["timings"]) for case in cases] == [
        ["batch 1", "batch 32", "batch 8"],
        ["prompt anew for every option", "prompt scanned once"],
    ]
    assert "token for token" in capsys.readouterr().out


def test_answers_that_depend_on_the_batch_are_not_timed(program, monkeypatch, tmp_path):
    answers = program.generate_answers

    def dependent(model, processor, batch, **options):
        return [
            reply._replace(text=f"{reply.text} {len(batch)}")
            for reply in answers(model, processor, batch, **options)
        ]

    monkeypatch.setattr(program, "generate_answers", dependent)
    with pytest.raises(
        program.DisagreementError, match=r"batch 8 answers \d of \d questions differently from batch 1"
    ):
        program.main(
            ["--quick", "--questions", "5", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
        )
