"""What the benchmarks rest on: turns, spread, the check before the clock, what is written."""

from __future__ import annotations

import json
import time

import pytest
import torch


def test_quartiles_are_interpolated(common):
    assert common.quartiles([4.0, 1.0, 3.0, 2.0]) == (1.75, 2.5, 3.25)
    assert common.quartiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no value was measured"):
        common.quartiles([])


def test_contenders_take_turns_in_changing_order(common):
    order = []
    runs = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in "abc"}
    timings = common.alternate(runs, rounds=3, sample_seconds=0.0)
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3, 3]
    assert order[-9:] == [*"abc", *"bca", *"cab"]  # before them, each ran twice to warm up


def test_a_slow_contender_runs_once_and_others_go_on(common):
    calls = []
    runs = {"slow": lambda: (calls.append(1), time.sleep(0.03)), "fast": lambda: None}
    timings = common.alternate(runs, rounds=4, budget=0.05, sample_seconds=0.0)
    assert len(timings["slow"].seconds) == len(calls) == 1
    assert len(timings["fast"].seconds) == 4


def test_ratios_are_of_rounds_that_both_ran(common):
    timings = {"a": common.Timing("a", [1.0, 2.0, 4.0]), "b": common.Timing("b", [3.0, 4.0])}
    case = common.Case("case", "a", timings)
    assert case.ratio("b") == (2.25, 2.5, 2.75)


def test_what_differs_is_not_timed(common):
    want = {"y": torch.tensor([1.0, 2.0]), "dx": torch.tensor([3.0])}
    near = {"y": torch.tensor([1.0, 2.00001]), "dx": torch.tensor([3.0])}
    assert 0 < common.check_same("scan", "near", near, want, 1e-4) < 1e-5
    with pytest.raises(
        common.DisagreementError, match=r"scan: far does not compute the same thing: y is off by 5"
    ):
        common.check_same("scan", "far", {**want, "y": torch.tensor([2.0, 2.0])}, want, 1e-4)
    with pytest.raises(common.DisagreementError, match="gives no 'dx'"):
        common.check_same("scan", "half", {"y": want["y"]}, want, 1e-4)
    with pytest.raises(common.DisagreementError, match=r"y has shape \(1,\), the oracle's \(2,\)"):
        common.check_same("scan", "small", {**want, "y": torch.ones(1)}, want, 1e-4)
    with pytest.raises(common.DisagreementError, match="y is off by nan"):
        common.check_same("scan", "nan", {**want, "y": torch.tensor([1.0, float("nan")])}, want, 1e-4)


def test_tables_json_and_plot(common, tmp_path, capsys):
    timings = {
        "ours": common.Timing("ours", [0.001, 0.002, 0.003]),
        "peer": common.Timing("peer", [0.01, 0.02, 0.03]),
    }
    case = common.Case("scan (1, 2)", "ours", timings, "tokens", 4.0, {"ours": 1e-7}, notes=["A note."])
    record = common.environment("cpu", 1)
    common.finish("ssm", tmp_path, [case], record)
    out = capsys.readouterr().out
    assert "| ours | 2 ms | 2,000.0 | 1.00 | 1.00 – 1.00 | 1e-07 |" in out
    assert "| peer | 20 ms | 200.0 | 10.00 | 10.00 – 10.00 |  |" in out
    assert "A note." in out
    data = json.loads((tmp_path / "ssm.json").read_text())
    assert data["cases"][0]["timings"]["peer"]["seconds"] == [0.01, 0.02, 0.03]
    assert {"cpu", "torch", "threads", "date", "command", "load"} <= data["environment"].keys()
    assert (tmp_path / "ssm.png").read_bytes().startswith(b"\x89PNG")
