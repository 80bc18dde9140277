"""Choice of backends, and the errors of the state-space operations."""

from __future__ import annotations

import logging
import re

import pytest
import torch

from vlmamba.errors import BackendError, ShapeError
from vlmamba.registry import Registry
from vlmamba.ssm import (
    ScanSpec,
    causal_conv1d,
    explain,
    registry,
    selective_scan,
    selective_state_update,
    use_backend,
)
from vlmamba.ssm.backends import cpu_build
from vlmamba.ssm.registry import choose_backend, explanations
from vlmamba.ssm.spec import Backend


@pytest.fixture
def inputs(scan_inputs):
    return {name: tensor.float() for name, tensor in scan_inputs(length=5).items()}


@pytest.fixture
def called(monkeypatch):
    """Names of the backends that ran, in order; the registry holds recording copies of the real ones."""
    names = []
    recording = Registry("state-space backend")
    for name in ("reference", "torch"):
        real = registry.get_backend(name)

        def scan(call, real=real):
            names.append(real.name)
            return real.scan(call)

        recording.add(name, Backend(name, real.priority, scan, real.conv, real.available, real.supports))
    monkeypatch.setattr(registry, "BACKENDS", recording)
    return names


def test_choice_by_argument_context_and_environment(inputs, called, monkeypatch):
    selective_scan(**inputs)
    selective_scan(**inputs, backend="reference")
    monkeypatch.setenv("VLMAMBA_SSM_BACKEND", "reference")
    selective_scan(**inputs)
    with use_backend("torch"):
        selective_scan(**inputs)
        with use_backend(None):
            selective_scan(**inputs)
        selective_scan(**inputs, backend="reference")
    selective_scan(**inputs)
    assert called == ["torch", "reference", "reference", "torch", "torch", "reference", "reference"]


def test_float64_goes_to_the_reference(scan_inputs, called):
    selective_scan(**scan_inputs())
    assert called == ["reference"]


def test_a_backend_asked_for_serves_or_raises(scan_inputs):
    with pytest.raises(BackendError) as error:
        selective_scan(**scan_inputs(), backend="torch")
    text = str(error.value)
    assert (
        "backend 'torch' (asked for by backend=) cannot serve this call (scan cpu float64 B=2 L=9 D=8" in text
    )
    assert "it computes in float32; float64 is served by 'reference'" in text


def test_environment_is_named_in_the_error(scan_inputs, monkeypatch):
    monkeypatch.setenv("VLMAMBA_SSM_BACKEND", "torch")
    with pytest.raises(BackendError, match="asked for by VLMAMBA_SSM_BACKEND"):
        selective_scan(**scan_inputs())


def test_unknown_backend_lists_close_matches(inputs):
    text = r"unknown state-space backend 'torhc'\. Did you mean 'torch'\? Known: cpu, mamba_ssm, reference"
    with pytest.raises(BackendError, match=text):
        selective_scan(**inputs, backend="torhc")
    with pytest.raises(BackendError, match=text), use_backend("torhc"):
        pass


def test_a_new_backend_is_one_entry(called):
    def scan(call):
        return call.u, None

    def supports(spec):
        return True if spec.dtype == torch.float32 else f"no kernel for {spec.dtype}"

    registry.BACKENDS.add("fast", Backend("fast", 50, scan, supports=supports))
    registry.BACKENDS.add("absent", Backend("absent", 90, scan, available=lambda: "no such device"))
    assert choose_backend(ScanSpec()).name == "fast"
    assert choose_backend(ScanSpec(dtype=torch.bfloat16)).name == "torch"
    assert choose_backend(ScanSpec(op="conv")).name == "torch"
    rows = {row.name: row for row in explanations(ScanSpec(dtype=torch.bfloat16))}
    assert rows["absent"].verdict == "no such device"
    assert rows["fast"].verdict == "no kernel for torch.bfloat16"
    assert [name for name, row in rows.items() if row.chosen] == ["torch"]
    assert {row.name: row.verdict for row in explanations(ScanSpec(op="conv"))}["fast"] == (
        "it has no causal convolution"
    )


def test_explain_is_a_table(monkeypatch):
    monkeypatch.setattr(cpu_build, "_loaded", ["no compiler"])
    spec = ScanSpec(dtype=torch.float64, features=frozenset({"z", "D"}))
    title, *lines = explain(spec).splitlines()
    assert title == "scan cpu float64 B=1 L=1 D=1 N=16 G=1 D+z"
    assert len(lines) == len(registry.BACKENDS.names())
    says = {line[4:].split(maxsplit=1)[0]: (line[:4], line[4:].split(maxsplit=1)[1]) for line in lines}
    assert says["cpu"] == ("    ", "no compiler")
    assert says["torch"] == ("    ", "it computes in float32; float64 is served by 'reference'")
    assert says["reference"] == ("  * ", "can serve")
    assert "* torch" in explain()


def test_choice_is_logged_once(inputs, caplog, monkeypatch):
    monkeypatch.setattr(registry, "_logged", set())
    monkeypatch.setattr(cpu_build, "_loaded", ["no compiler"])
    with caplog.at_level(logging.INFO, logger="vlmamba.ssm.registry"):
        for _ in range(3):
            selective_scan(**inputs)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "state-space backend 'torch' serves: scan cpu float32 B=2 L=5 D=8 N=4 G=1 D+dt_bias+initial_state+z"
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dt": torch.zeros(2, 4, 8)}, r"dt has shape \(2, 4, 8\), but \(B, L, D\) like u = \(2, 5, 8\)"),
        ({"z": torch.zeros(2, 5, 8).half()}, r"z has dtype torch.float16, but torch.float32 \(like u\)"),
        ({"A": torch.zeros(4, 8)}, r"A has shape \(4, 8\), but \(D, N\) = \(8, any\)"),
        ({"B": torch.zeros(2, 5, 3, 4)}, "B has 3 groups, which do not divide the 8 channels of u evenly"),
        ({"C": torch.zeros(2, 5, 2, 4)}, r"B has shape \(2, 5, 1, 4\), C \(2, 5, 2, 4\); they must be equal"),
        ({"D": torch.zeros(7)}, r"D has shape \(7,\), but \(D\) = \(8\)"),
        ({"seq_idx": torch.zeros(2, 4).int()}, r"seq_idx has shape \(2, 4\), but \(B, L\) = \(2, 5\)"),
        ({"seq_idx": torch.zeros(2, 5)}, "seq_idx has dtype torch.float32, but an integer dtype is needed"),
        ({"initial_state": torch.zeros(2, 4, 8)}, r"initial_state has shape \(2, 4, 8\)"),
        (
            {"state_at": torch.tensor([[5], [0]])},
            "state_at has values from 0 to 5, but only those from 0 to 4",
        ),
        ({"reverse": (True, False)}, "reverse has 2 entries for 1 groups of B and C"),
        ({"A": torch.zeros(8, 4, device="meta")}, "A is on meta, but the input is on cpu"),
        (
            {"initial_state": torch.zeros(2, 8, 4, device="meta")},
            "initial_state is on meta, but the input is on",
        ),
        (
            {"B": torch.zeros(2, 5, 1, 4).bfloat16()},
            r"B has dtype torch.bfloat16, but torch.float32 \(like u\) is needed",
        ),
        ({"A": torch.ones(8, 4).int()}, "A has dtype torch.int32, but a floating-point dtype is needed"),
        (
            {"initial_state": torch.ones(2, 8, 4).long()},
            "initial_state has dtype torch.int64, but a floating",
        ),
        ({"reverse": None}, "reverse is None, but a bool, or one for each group, is needed"),
        ({"u": torch.zeros(2, 5)}, r"u has shape \(2, 5\), but \(B, L, D\) = \(any, any, any\) is needed"),
        (
            {name: torch.zeros(2, 5, 8).int() for name in ("u", "dt", "z")}
            | {name: torch.zeros(2, 5, 4).int() for name in ("B", "C")},
            "u has dtype torch.int32, but a floating-point dtype is needed",
        ),
    ],
)
def test_misfits_carry_both_values(inputs, change, text):
    with pytest.raises(ShapeError, match=text):
        selective_scan(**(inputs | change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"state": torch.zeros(2, 8, 3)}, r"state has shape \(2, 8, 3\), but \(B, D, N\) = \(2, 8, 4\)"),
        ({"dt": torch.zeros(2, 7)}, r"dt has shape \(2, 7\), but \(B, D\) like u = \(2, 8\)"),
        ({"C": torch.zeros(2, 3)}, r"C has shape \(2, 1, 3\), but \(B, G, N\) or \(B, N\) = \(2, any, 4\)"),
        ({"B": torch.zeros(2, 3, 4)}, "B has 3 groups, which do not divide the 8 channels of u evenly"),
        ({"z": torch.zeros(2, 8).half()}, r"z has dtype torch.float16, but torch.float32 \(like u\)"),
        ({"A": torch.zeros(8, 4, device="meta")}, "A is on meta, but the input is on cpu"),
        ({"state": torch.zeros(2, 8, 4).int()}, "state has dtype torch.int32, but a floating-point dtype is"),
    ],
)
def test_step_misfits_carry_both_values(change, text):
    u, matrix = torch.zeros(2, 8), torch.zeros(2, 4)
    arguments = {
        "state": torch.zeros(2, 8, 4),
        "u": u,
        "dt": u,
        "A": torch.zeros(8, 4),
        "B": matrix,
        "C": matrix,
    }
    with pytest.raises(ShapeError, match=text):
        selective_state_update(**(arguments | change))


def test_every_operation_refuses_a_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setattr(cpu_build, "_loaded", ["no compiler"])
    u = torch.zeros(1, 3, 4)
    calls = {
        "scan": lambda **named: selective_scan(u, u, torch.zeros(4, 2), u[..., :2], u[..., :2], **named),
        "conv": lambda **named: causal_conv1d(u, torch.zeros(4, 2), **named),
        "step": lambda **named: selective_state_update(
            *(torch.zeros(1, 4, 2), u[:, 0], u[:, 0], torch.zeros(4, 2), u[:, 0, :2], u[:, 0, :2]), **named
        ),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match="unknown state-space backend 'gpu'") as unknown:
            call(backend="gpu")
        assert "Known: cpu, " in str(unknown.value)
        with pytest.raises(
            ValueError, match=rf"backend 'cpu' .* cannot serve this call \({op} cpu"
        ) as refused:
            call(backend="cpu")
        for line in (r"cpu +no compiler", r"\* torch +can serve", r"reference +can serve"):
            assert re.search(line, str(refused.value))


def test_a_backend_without_a_step_says_so(called):
    def step(call):
        return call.u

    registry.BACKENDS.add("scan_only", Backend("scan_only", 50, lambda call: (call.u, None)))
    registry.BACKENDS.add("stepper", Backend("stepper", 20, lambda call: (call.u, None), step=step))
    spec = ScanSpec(op="step")
    assert choose_backend(spec).name == "stepper"
    rows = {row.name: row.verdict for row in explanations(spec)}
    assert rows["scan_only"] == "it has no one-step update"
    u = torch.ones(2, 8)
    arguments = (torch.zeros(2, 8, 4), u, u, torch.ones(8, 4), *torch.ones(2, 2, 4))
    assert selective_state_update(*arguments) is u
    with pytest.raises(
        BackendError, match=r"'scan_only' .* \(step cpu float32 .*: it has no one-step update"
    ):
        selective_state_update(*arguments, backend="scan_only")
