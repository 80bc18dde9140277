"""The Triton backend: its maths in the interpreter, in processes of their own; its kernels through the compiler;
on a CUDA device, everything.

The interpreter is switched on by an environment variable that must be there before triton is imported. Tests of
the class `TestInterpreted` therefore run only in a process that has it, and others start such processes.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmamba.errors import BackendError
from vlmamba.ssm import ScanSpec, causal_conv1d, selective_scan, selective_state_update
from vlmamba.ssm.backends import triton as backend_module
from vlmamba.ssm.backends.triton_tuning import Tiling, interpreted, power_of_two, tune
from vlmamba.ssm.registry import choose_backend, get_backend, judge

pytest.importorskip("triton", reason="triton is not installed")

TIMED = ("u", "dt", "B", "C", "z")
HERE = Path(__file__).parent


def _in_the_interpreter(*arguments: str, timeout: int) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(interpreted(), reason="this is the interpreter's process")
class TestProcesses:
    @pytest.mark.ci
    @pytest.mark.timeout(600)
    def test_a_sample(self):
        report = _in_the_interpreter(str(Path(__file__)), "-k", "TestInterpreted", timeout=580)
        assert " passed" in report
        assert "failed" not in report

    @pytest.mark.slow
    @pytest.mark.timeout(7200)
    def test_the_grid(self):
        assert " passed" in _in_the_interpreter(str(Path(__file__)), "-m", "slow", "-k", "grid", timeout=7100)

    @pytest.mark.slow
    @pytest.mark.timeout(7200)
    @pytest.mark.parametrize("shared", ["test_scan_parity.py", "test_scan_laws.py", "test_conv.py"])
    def test_all_shared_tests(self, shared):
        names = "triton and not long_rows"  # 512 steps take the interpreter too long
        report = _in_the_interpreter(str(HERE / shared), "-k", names, timeout=7100)
        assert " passed" in report


@pytest.mark.skipif(not interpreted(), reason="it needs a process with TRITON_INTERPRET=1")
class TestInterpreted:
    def test_it_is_never_chosen_by_itself(self):
        assert get_backend("triton").available() is True
        assert choose_backend(ScanSpec(), "triton").name == "triton"
        for spec in (ScanSpec(), ScanSpec(op="conv", state_size=4), ScanSpec(op="step")):
            assert choose_backend(spec).name in ("cpu", "torch")

    def test_packed_in_both_directions(self, scan_inputs, run_with_gradients, assert_near, segments):
        inputs = scan_inputs(batch=1, length=21, groups=2)
        options = {"seq_idx": segments([6, 1, 14]), "reverse": (False, True), "return_last_state": True}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="triton", **options), want, 2e-6)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_time_is_split(
        self, scan_inputs, run_with_gradients, assert_near, segments, monkeypatch, reverse
    ):
        from vlmamba.ssm.backends import triton_scan

        seen = []
        monkeypatch.setattr(triton_scan, "SHORTEST_SPLIT", 9)
        monkeypatch.setattr(
            triton_scan.forward_kernels, "combine", _recording(triton_scan.forward_kernels.combine, seen)
        )
        inputs = scan_inputs(batch=1, length=35, channels=3, size=3)
        options = {"seq_idx": segments([20, 15]), "reverse": reverse, "return_last_state": True}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="triton", **options), want, 2e-6)
        assert [cut.splits for cut in seen] == [3, 3]

    @pytest.mark.slow
    @pytest.mark.parametrize("length", [1, 3, 33, 64])
    @pytest.mark.parametrize(
        ("groups", "reverse"), [(1, False), (1, True), (2, (False, True)), (4, (True, False, False, True))]
    )
    @pytest.mark.parametrize("state", ["last", "at"])
    def test_grid(self, scan_inputs, run_with_gradients, assert_near, length, groups, reverse, state):
        inputs = scan_inputs(batch=1, length=length, groups=groups, channels=4 * groups)
        options = {"reverse": reverse, "seq_idx": (torch.rand(1, length) < 0.1).cumsum(1).int()}
        options |= {"return_last_state": True} if state == "last" else {}
        if state == "at":
            options["state_at"] = torch.randint(0, length, (1, 3))
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="triton", **options), want, 2e-6)

    def test_asked_states(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(batch=1, length=18, channels=5, size=3, dt_bias=False, D=False, z=False)
        options = {"state_at": torch.tensor([[17, 3, 16, 3, 0]])}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="triton", **options), want, 2e-6)

    def test_bfloat16_and_views(self, scan_inputs, run_with_gradients, assert_near):
        inputs = {n: t.bfloat16().double() for n, t in scan_inputs(batch=1, length=7).items()}
        want = run_with_gradients(inputs, torch.float64, backend="reference")
        assert_near(run_with_gradients(inputs, torch.bfloat16, backend="triton"), want, 1e-2)
        plain = {name: tensor.float() for name, tensor in inputs.items()}
        views = {
            n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t for n, t in plain.items()
        }
        y = selective_scan(**views, backend="triton")
        assert torch.equal(y, selective_scan(**plain, backend="triton"))

    @pytest.mark.parametrize("reverse", [False, True])
    def test_conv(self, run_with_gradients, assert_near, segments, reverse):
        def noise(*shape):
            return torch.randn(*shape, dtype=torch.float64)

        inputs = {
            "x": noise(2, 19, 5),
            "weight": noise(5, 4),
            "bias": noise(5),
            "initial_state": noise(2, 3, 5),
        }
        options = {"function": causal_conv1d, "activation": "silu", "reverse": reverse, "return_state": True}
        options["seq_idx"] = segments([2, 1, 16], [19])
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="triton", **options), want, 2e-6)

    @pytest.mark.parametrize("dropped", [(), ("D", "z", "dt_bias")])
    def test_step(self, scan_inputs, assert_near, dropped):
        _check_step(scan_inputs, assert_near, "cpu", dropped)

    def test_bad_numbers_stay_in_their_segment(self, scan_inputs, segments):
        inputs = {name: tensor.float() for name, tensor in scan_inputs(batch=1, length=9).items()}
        inputs["u"][0, 2, 2] = float("nan")
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        y = selective_scan(**inputs, seq_idx=segments([5, 4]), backend="triton")
        assert not y[0, 2:5, 2].isfinite().any()
        assert y[0, 5:].isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), inputs["u"])
        assert gradient[0, 5:].isfinite().all()


def _recording(kernel, seen):
    """The kernel, keeping the `Cut` of each launch."""

    class Recorder:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append(arguments[2])
                return kernel[grid](*arguments, **options)

            return launch

    return Recorder()


def _check_step(scan_inputs, assert_near, device, dropped=()):
    inputs = scan_inputs(length=1, groups=2, channels=38, **dict.fromkeys(dropped, False))
    arguments = {n: t[:, 0] if n in TIMED else t for n, t in inputs.items()}
    results = []
    for dtype, backend, where in ((torch.float64, "reference", "cpu"), (torch.float32, "triton", device)):
        own = {name: tensor.to(where, dtype).clone() for name, tensor in arguments.items()}
        state = own.pop("initial_state").transpose(1, 2).contiguous().transpose(1, 2)
        with torch.no_grad():
            y = selective_state_update(state, **own, backend=backend)
        results.append({"y": y.cpu().double(), "state": state.cpu().double()})
    assert_near(results[1], results[0], 2e-6)


@pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_without_a_device(scan_inputs, segments, monkeypatch, tmp_path, capability, dtype):
    """Every launch of a forward and backward pass goes through the compiler, for A100 (80) and H100 (90)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import KernelInterface

    from vlmamba.ssm.backends import triton_conv, triton_scan, triton_step
    from vlmamba.ssm.spec import ConvCall, ScanCall, StepCall

    class Device:
        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _=None):
            return 0

    compiled = []

    def launcher(self, grid):
        def launch(*arguments, **options):
            compiled.append(self.warmup(*arguments, grid=grid, **options).name)

        return launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr(driver, "_active", Device())
    made = scan_inputs(batch=1, length=200, channels=64, size=16, groups=2)
    leaf = {n: t.to(dtype if n in TIMED else torch.float32).requires_grad_() for n, t in made.items()}
    u, bias, start = leaf["u"], leaf["dt_bias"], leaf["initial_state"]
    order = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
    ids = segments([150, 50])
    at = torch.tensor([[3, 150]])
    fixed = (True, ids, start, (False, True))
    for tail in ((at, False), (None, True)):
        y, states = triton_scan.scan(ScanCall(*(leaf[n] for n in order), *fixed, *tail))
        torch.autograd.backward([y, states], [torch.ones_like(y), torch.ones_like(states)])
    weight = torch.ones(64, 4, requires_grad=True)
    triton_conv.conv(ConvCall(u, weight, bias, "silu", ids, True, 3)).sum().backward()
    with torch.no_grad():
        token = {n: t[:, 0] if n in TIMED else t for n, t in leaf.items()}
        triton_step.step(StepCall(start, *(token[n] for n in order), True))
    assert set(compiled) == {
        *("scan_forward", "local_states", "combine", "states_at", "scan_backward", "local_gradients"),
        *("conv_forward", "conv_backward", "update"),
    }


@pytest.mark.skipif(interpreted(), reason="it is about processes without the interpreter")
class TestChoice:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_without_a_device(self, scan_inputs):
        reason = "there is no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly, to check it)"
        assert judge(get_backend("triton"), ScanSpec()) == reason
        with pytest.raises(BackendError, match=r"backend 'triton' .* there is no CUDA device"):
            selective_scan(**{n: t.float() for n, t in scan_inputs().items()}, backend="triton")

    def test_without_triton(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        assert backend_module.available() == "the package 'triton' is not installed"

    def test_a_compiler_that_fails_is_quoted(self, monkeypatch):
        def fail():
            raise OSError("cannot find -lcuda")

        monkeypatch.setattr("vlmamba.ssm.backends.triton_probe.add_one", fail)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        backend_module._probe.cache_clear()
        assert backend_module.available() == "a small Triton kernel fails: OSError: cannot find -lcuda"
        backend_module._probe.cache_clear()

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            ({}, True),
            ({"op": "conv", "state_size": 4}, True),
            ({"op": "step"}, True),
            ({"device": "cpu"}, "it runs on cuda, not on cpu"),
            ({"dtype": torch.float64}, "it computes in float32; float64 is served by 'reference'"),
            ({"state_size": 129}, "N = 129 does not fit into registers (at most 128)"),
            ({"op": "conv", "state_size": 9}, "a kernel of 9 taps is too wide (at most 8)"),
            ({"op": "step", "needs_grad": True}, "its decode step has no gradient"),
            (
                {"groups": 64, "features": frozenset({"reverse"})},
                "it reverses at most 62 groups, not 64",
            ),
        ],
    )
    def test_supports(self, spec, reason):
        assert backend_module.supports(ScanSpec(**({"device": "cuda"} | spec))) == reason

    def test_it_comes_before_the_others_on_cuda(self):
        priorities = {name: get_backend(name).priority for name in ("torch", "mamba_ssm", "triton")}
        assert priorities["torch"] < priorities["mamba_ssm"] < priorities["triton"]

    def test_import_needs_no_triton(self):
        code = "import sys, vlmamba.ssm.backends.triton, vlmamba.ssm.backends.mamba_ssm; print('triton' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


class TestTuning:
    def test_tiles_that_do_not_fit_are_left_out(self):
        candidates = (Tiling(64, 4), Tiling(16, 2))
        device = torch.device("cpu")
        assert tune(("a",), candidates, 16, device, lambda _: None) == Tiling(16, 2)
        assert tune(("b",), candidates, 8, device, lambda _: None) == Tiling(64, 4)
        assert tune(("c",), candidates, 128, device, lambda _: None) == Tiling(16, 1)

    def test_power_of_two(self):
        assert [power_of_two(n) for n in (1, 2, 3, 16, 17)] == [1, 2, 4, 16, 32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnTheDevice:
    @pytest.fixture
    def compare(self, run_with_gradients, assert_near):
        """Compares the backend on the device with the reference in float64, on the same rounded inputs."""

        def check(function, inputs, dtype, tolerance, **options):
            inputs = {name: tensor.to(dtype).double() for name, tensor in inputs.items()}

            def run(where, backend, **tensors):
                moved = {n: t.to(where) for n, t in options.items() if isinstance(t, torch.Tensor)}
                found = function(
                    **{n: t.to(where) for n, t in tensors.items()}, **(options | moved), backend=backend
                )
                return tuple(t.cpu() for t in found) if isinstance(found, tuple) else found.cpu()

            want = run_with_gradients(inputs, torch.float64, functools.partial(run, "cuda", "reference"))
            got = run_with_gradients(inputs, dtype, functools.partial(run, "cuda", "triton"))
            assert_near(got, want, tolerance)

        return check

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
    @pytest.mark.parametrize("length", [1, 33, 130, 930])
    @pytest.mark.parametrize(
        ("groups", "reverse"), [(1, False), (1, True), (2, (False, True)), (4, (True, False, False, True))]
    )
    @pytest.mark.parametrize("state", ["none", "last", "at"])
    def test_scan(self, scan_inputs, compare, dtype, tolerance, length, groups, reverse, state):
        inputs = scan_inputs(length=length, channels=40 * groups, size=16, groups=groups)
        options = {"reverse": reverse, "seq_idx": (torch.rand(2, length) < 0.05).cumsum(1).int()}
        options |= {"none": {}, "last": {"return_last_state": True}}.get(state, {})
        if state == "at":
            options["state_at"] = torch.randint(0, length, (2, 7))
        compare(selective_scan, inputs, dtype, tolerance, **options)

    @pytest.mark.parametrize("size", [1, 3, 8, 64, 128])
    @pytest.mark.parametrize("dropped", [(), ("D", "z", "dt_bias", "initial_state")])
    def test_state_sizes(self, scan_inputs, compare, size, dropped):
        inputs = scan_inputs(length=70, channels=64, size=size, **dict.fromkeys(dropped, False))
        compare(selective_scan, inputs, torch.float32, 5e-6)

    @pytest.mark.parametrize("raw", [60.0, 0.0, -14.0])
    def test_extreme_time_steps(self, scan_inputs, compare, raw):
        inputs = scan_inputs(length=200, channels=64, size=16, dt_bias=False)
        inputs["dt"] = raw + 0.1 * inputs["dt"]
        compare(selective_scan, inputs, torch.float32, 5e-6, return_last_state=True)

    @pytest.mark.parametrize("length", [1, 3, 33, 930])
    @pytest.mark.parametrize("taps", [1, 2, 4])
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
    def test_conv(self, compare, length, taps, reverse, dtype, tolerance):
        def noise(*shape):
            return torch.randn(*shape, dtype=torch.float64)

        inputs = {"x": noise(2, length, 200), "weight": noise(200, taps), "bias": noise(200)}
        inputs["initial_state"] = noise(2, taps - 1, 200)
        ids = (torch.rand(2, length) < 0.1).cumsum(1).int()
        compare(causal_conv1d, inputs, dtype, tolerance, reverse=reverse, activation="silu", seq_idx=ids)

    def test_step(self, scan_inputs, assert_near):
        _check_step(scan_inputs, assert_near, "cuda")

    def test_runs_are_equal_bit_for_bit(self, scan_inputs):
        inputs = scan_inputs(batch=1, length=2048, channels=512, size=16, groups=2, initial_state=False)
        leaves = {n: t.to("cuda", torch.bfloat16).requires_grad_() for n, t in inputs.items()}
        ids = (torch.arange(2048, device="cuda") // 700).int().unsqueeze(0)
        results = []
        for _ in range(3):
            y = selective_scan(**leaves, seq_idx=ids, reverse=(False, True), backend="triton")
            results.append([y, *torch.autograd.grad(y.float().square().sum(), list(leaves.values()))])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_offsets_beyond_32_bits(self):
        length, channels = 2**20 + 7, 2112
        if torch.cuda.mem_get_info()[0] < 40e9:
            pytest.skip("it needs 40 GB of free device memory")
        u = torch.zeros(1, length, channels, device="cuda", dtype=torch.bfloat16)
        u[0, -3:] = 1
        ones = torch.ones(1, length, 1, device="cuda", dtype=torch.bfloat16)
        A = torch.zeros(channels, 1, device="cuda")
        y = selective_scan(u, u, A, ones, ones, dt_softplus=False, backend="triton")
        assert y[0, -3:, -1].tolist() == [1.0, 2.0, 3.0]
        assert y[0, :-3].abs().max() == 0
