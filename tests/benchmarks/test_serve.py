"""Twenty seconds of hostile load: honest answers stay right, whole and in time, and memory is steady."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
PROGRAM = Path(__file__).parents[2] / "benchmarks/serve.py"


@pytest.mark.ci
def test_honest_clients_are_served_beside_hostile_ones(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_serve", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_serve", program)
    spec.loader.exec_module(program)
    monkeypatch.setattr(os, "nice", lambda by: 0)  # the tests that follow keep their priority
    seen, figures = program.measure(None, seconds=21, rounds=1, clients=60)
    assert seen.wrong == []
    assert len(seen.beside[0]) > 5
    assert figures["longest wait over longest alone, worst round"] < 8  # two, with the margin of four
    assert seen.growth() < 1.2
    statuses = {kind: set(outcomes) - {"timed out"} for kind, outcomes in seen.refused.items()}
    for kind in ("deep JSON", "wrong fields", "long prompt", "huge picture", "broken picture", "no HTTP"):
        assert statuses.get(kind, {"400"}) == {"400"}, kind
    assert statuses.get("too large", {"413"}) == {"413"}
    assert statuses.get("half a body", {"408"}) == {"408"}
