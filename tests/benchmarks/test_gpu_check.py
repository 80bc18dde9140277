"""scripts/gpu_check.sh: what of it runs without a GPU; pieces that fail, hang or lack packages hide no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu_check(load):
    return load("gpu_check")


@pytest.fixture(scope="module")
def setting(load):
    return load("_gpu_ops").Setting("cpu", True, time.monotonic() + 600)


def rows_of(function, setting):
    return list(function(setting))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_one_line_and_status_2():
    script = ["bash", str(ROOT / "scripts/gpu_check.sh")]
    done = subprocess.run(
        script, capture_output=True, text=True, env={**os.environ, "VLMAMBA_PYTHON": sys.executable}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: no CUDA device here (rehearse with --device cpu --tiny)\n"


def test_parity_holds_and_covers_every_feature(load, setting, monkeypatch):
    ops = load("_gpu_ops")
    monkeypatch.setattr(ops, "backends", lambda device, op="scan": ["torch"])
    rows = rows_of(ops.parity, setting)
    assert all(row.ok for row in rows), [row for row in rows if not row.ok]
    cases = {row.case for row in rows}
    assert {f"scan fp32 (2, 33, 40, 8) {feature}" for feature in ops.FEATURES} <= cases
    assert {"conv bf16 packed", "step fp32", "same bits twice (2, 130, 64, 16)"} <= cases


def test_parity_finds_a_wrong_backend(load, setting, monkeypatch):
    ops = load("_gpu_ops")
    right = ops.selective_scan

    def wrong(*args, backend=None, **options):
        answer = right(*args, backend="reference", **options)
        return answer * 1.001 if backend == "torch" and torch.is_tensor(answer) else answer

    monkeypatch.setattr(ops, "selective_scan", wrong)
    monkeypatch.setattr(ops, "backends", lambda device, op="scan": ["torch"])
    (row,) = ops._parity_case(setting, (1, 5, 8, 4), torch.float32, "packed")
    assert not row.ok
    assert row.text.endswith("is off, 2e-06 is allowed")


def test_a_backend_that_refuses_is_not_a_failure(load, setting, monkeypatch):
    ops = load("_gpu_ops")
    monkeypatch.setattr(ops, "backends", lambda device, op="scan": ["cpu"])
    monkeypatch.setattr(
        ops, "_results", lambda made, options, name, exact=False: {} if exact else _refuse(name)
    )
    (row,) = ops._parity_case(setting, (1, 5, 8, 4), torch.float32, "plain")
    assert (row.ok, row.text) == (True, "does not serve this")


def _refuse(name):
    raise ValueError(f"backend {name!r} (asked for by backend=) cannot serve this call (...)")


def test_scan_layer_train_and_decode_in_tiny(load, setting):
    ops, model = load("_gpu_ops"), load("_gpu_model")
    for function, columns in (
        (ops.scan, {"forward ms", "forward + backward ms", "M tokens/s"}),
        (ops.layer, {"forward + backward ms", "over projections"}),
        (model.train, {"step s", "tokens/s", "TFLOP/step"}),
        (model.decode, {"tokens/s"}),
    ):
        rows = rows_of(function, setting)
        assert rows
        assert all(row.ok for row in rows), rows
        assert all(columns <= row.values.keys() for row in rows if row.values)


def test_flops_are_counted_operator_by_operator(load):
    """The counter that the MFU rests on: 2 m n k a product, forward and both gradients."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = torch.nn.Linear(16, 24, bias=False)
    x = torch.randn(8, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * 16 * 24


def options(tmp_path, **changes):
    fields = {"device": "cpu", "tiny": True, "out": tmp_path, "budget": 1.0, "pieces": []}
    return Namespace(**(fields | changes))


ROW = {"case": "a case", "name": "triton", "values": {"forward ms": 1.5}, "ok": True, "text": ""}


def piece(gpu_check, tmp_path, monkeypatch, *, rows, then="", budget=60.0):
    """Run a piece whose process writes these rows and then does something else."""
    (tmp_path / "given").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = tmp_path / "program.py"
    copying = "import shutil, sys, time\nout = sys.argv[sys.argv.index('--out') + 1]\n"
    program.write_text(f"{copying}shutil.copy(out + '/given', out + '/scan.jsonl')\n{then}\n")
    monkeypatch.setitem(gpu_check.BUDGETS, "scan", budget)
    return gpu_check.run_piece("scan", options(tmp_path), [sys.executable, str(program)])


def test_a_piece_that_breaks_keeps_its_rows(gpu_check, tmp_path, monkeypatch):
    then = "raise RuntimeError('illegal memory access')"
    found = piece(gpu_check, tmp_path, monkeypatch, rows=[ROW], then=then)
    assert not found["ok"]
    assert "ended with status 1: RuntimeError: illegal memory access" in found["problem"]
    assert found["rows"] == [ROW]


@pytest.mark.ci
def test_a_piece_that_hangs_is_stopped_and_keeps_its_rows(gpu_check, tmp_path, monkeypatch):
    found = piece(gpu_check, tmp_path, monkeypatch, rows=[ROW], then="time.sleep(100)", budget=5.0)
    assert found["problem"] == "stopped after 5 s; what is below was ready by then"
    assert found["rows"] == [ROW]


def test_a_piece_that_finds_nothing_is_not_ok(gpu_check, tmp_path, monkeypatch):
    found = piece(gpu_check, tmp_path, monkeypatch, rows=[])
    assert (found["ok"], found["problem"]) == (False, "found nothing to measure")


def test_the_report(gpu_check):
    parity = [
        {
            "case": "scan fp32 (1, 2) packed",
            "name": "triton",
            "values": {"error": 3e-7},
            "ok": True,
            "text": "",
        },
        {
            "case": "scan fp32 (1, 2) plain",
            "name": "triton",
            "values": {"error": 0.1},
            "ok": False,
            "text": "y is off",
        },
        {
            "case": "scan fp32 (1, 2) reverse",
            "name": "triton",
            "values": {},
            "ok": True,
            "text": "does not serve this",
        },
    ]
    record = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-21T05:00:00+00:00"}
    pieces = [
        {"piece": "parity", "ok": False, "seconds": 9.0, "problem": "", "failed": 1, "rows": parity},
        {
            "piece": "scan",
            "ok": False,
            "seconds": 80.0,
            "problem": "stopped after 80 s",
            "failed": 0,
            "rows": [ROW],
        },
    ]
    text = gpu_check.markdown({"environment": record, "pieces": pieces})
    assert "2026-11-21, NVIDIA H200, torch 2.11.0, triton 3.6.0" in text
    assert "| scan fp32 | triton | 3 | 1 | 1 | 1.0e-01 |" in text
    assert "- scan fp32 (1, 2) plain, triton: y is off" in text
    assert "**stopped after 80 s**" in text
    assert "| a case | triton | 1.5 |  |" in text


def test_budgets_stay_under_eight_minutes(gpu_check):
    assert sum(gpu_check.BUDGETS.values()) < 8 * 60


def test_an_unknown_piece_is_named(gpu_check, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["scam"])
    assert "unknown piece 'scam'; there are parity, scan, layer, train, decode" in capsys.readouterr().err


@pytest.mark.ci
def test_it_needs_core_packages_only(tmp_path):
    """As on an image that has torch and transformers and little else."""
    missing = ["datasets", "open_clip", "timm", "peft", "accelerate", "matplotlib", "sklearn", "skimage"]
    missing += ["tensorboard", "mambapy", "mamba_ssm", "causal_conv1d", "torchvision", "sentencepiece"]
    program = ROOT / "benchmarks" / "gpu_check.py"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing!r}))  # as if they were not installed
sys.path.insert(0, {str(program.parent)!r})
import gpu_check
import _gpu_model, _gpu_ops, time
setting = _gpu_ops.Setting('cpu', True, time.monotonic() + 600)
for function in (_gpu_ops.scan, _gpu_ops.layer, _gpu_model.train, _gpu_model.decode):
    assert all(row.ok for row in function(setting))
print('all ran')
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.strip() == "all ran", done.stderr[-2000:]


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    script = ["bash", str(ROOT / "scripts/gpu_check.sh"), "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    env = {**os.environ, "VLMAMBA_PYTHON": sys.executable}
    done = subprocess.run(script, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [piece["piece"] for piece in report["pieces"]] == ["parity", "scan", "layer", "train", "decode"]
    assert "### decode: ok" in (tmp_path / "gpu_check.md").read_text()
