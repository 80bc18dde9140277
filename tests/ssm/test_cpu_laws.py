"""The laws of the native CPU kernel, at every level of processor that this machine can run, with every compiler it has.

The number of lanes, whether products can be added without a rounding in between, and what a compiler makes of a loop
differ from one to the next; the laws do not. `tests/conftest.py` prints which ran.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vlmamba.ssm import causal_conv1d, selective_scan, selective_state_update
from vlmamba.ssm.backends import cpu_build, cpu_library

LANES = {"x86-64-v2": 4, "x86-64-v3": 8, "x86-64-v4": 16}
ATEN = {"default": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
"""torch's own switch, ATEN_CPU_CAPABILITY, and the level that goes with it."""


def _missing(level: str, compiler: str) -> str | None:
    return f"there is no {compiler}" if shutil.which(compiler) is None else cpu_build.lacking(level)


BUILDS = [(level, compiler) for compiler in ("g++", "clang++") for level in cpu_build.LEVELS]
HERE = [(None, None), *(build for build in BUILDS if _missing(*build) is None)]
NOT_HERE = [
    f"{level} {compiler}: {_missing(level, compiler)}"
    for level, compiler in BUILDS
    if _missing(level, compiler)
]

if not any(shutil.which(name) for name in cpu_build.COMPILERS):
    pytest.skip("there is no C++ compiler", allow_module_level=True)


@pytest.fixture(scope="module", params=HERE, ids=lambda build: " ".join(filter(None, build)) or "native")
def built(request: pytest.FixtureRequest) -> Iterator[str]:
    """The library of one level and compiler in place of this processor's own."""
    level, compiler = request.param
    with pytest.MonkeyPatch.context() as patch:
        if level is not None:
            patch.setenv(cpu_build.LEVEL_VARIABLE, level)
            patch.setenv("CXX", compiler)
        cpu_build.forget()
        assert cpu_library.available() is True
        assert level is None or cpu_library.library().vlmamba_scan_lanes() == LANES[level]
        yield f"{level} {compiler}" if level else "native"
    cpu_build.forget()


@pytest.fixture
def noted(built, record_property):
    """Has the levels in the summary of the run."""
    record_property("level", built)
    record_property("level not here", "; ".join(NOT_HERE))


@pytest.mark.usefixtures("noted")
class TestExact:
    """As near to fp64 as fp32 can be."""

    @pytest.mark.parametrize(("length", "channels", "size", "groups"), [(33, 36, 5, 2), (70, 40, 16, 1)])
    def test_scan(self, scan_inputs, assert_as_exact_as_float32, length, channels, size, groups):
        inputs = scan_inputs(length=length, channels=channels, size=size, groups=groups)
        ids = (torch.rand(2, length) < 0.1).cumsum(1)
        assert_as_exact_as_float32(inputs, "cpu", seq_idx=ids, reverse=(True, False)[:groups])

    @pytest.mark.parametrize("raw", [60.0, 19.0, 0.0, -14.0])
    def test_extreme_time_steps(self, scan_inputs, assert_as_exact_as_float32, raw):
        inputs = scan_inputs(length=40, channels=18, dt_bias=False)
        inputs["dt"] = raw + 0.1 * inputs["dt"]
        assert_as_exact_as_float32(inputs, "cpu", tolerance=2e-6 if raw > 0 else 4e-6)

    @torch.no_grad()
    def test_large_exponents(self):
        """Decays down to 1e-35, each to its last bits; were the products dt A rounded, they would be off by 3e-6."""
        dt, A = 20 + 60 * torch.rand(3, 1, 64), -torch.rand(64, 16)
        zero, matrix, start = torch.zeros(3, 1, 64), torch.ones(3, 1, 16), torch.ones(3, 64, 16)
        rate = A * 1.44269504088896341  # to the base of two, in fp32 as the kernel's
        want = torch.exp2(dt.double().transpose(1, 2) * rate.double())
        options = {"dt_softplus": False, "backend": "cpu"}
        _, scanned = selective_scan(
            zero, dt, A, matrix, matrix, initial_state=start, return_last_state=True, **options
        )
        stepped = start.clone()
        selective_state_update(stepped, zero[:, 0], dt[:, 0], A, matrix[:, 0], matrix[:, 0], **options)
        assert torch.equal(scanned, stepped)
        assert ((scanned - want) / want).abs().max() < 1e-6

    def test_convolution(self, run_with_gradients, assert_near):
        inputs = {"x": torch.randn(2, 70, 40), "weight": torch.randn(40, 4), "bias": torch.randn(40)}
        options = {
            "function": causal_conv1d,
            "activation": "silu",
            "seq_idx": torch.arange(70).expand(2, 70) // 40,
        }
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu", **options), want, 4e-6)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_numbers_stay_in_their_segment(self, scan_inputs, segments, bad):
        inputs = {name: tensor.float() for name, tensor in scan_inputs(length=20).items()}
        inputs["u"][0, 3, 2] = bad
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        y = selective_scan(**inputs, seq_idx=segments([9, 11], [9, 11]), backend="cpu")
        assert not y[0, 3:9, 2].isfinite().any()
        assert y[0, 9:].isfinite().all()
        assert y[1].isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), inputs["u"])
        assert gradient[0, 9:].isfinite().all()


@pytest.mark.usefixtures("noted")
class TestBitForBit:
    """What is one number by the laws is one number, whatever the lanes and the compiler."""

    @pytest.fixture
    def run(self, scan_inputs, run_with_gradients):
        inputs = scan_inputs(batch=3, length=75, channels=100, size=9, groups=2)
        options = {"return_last_state": True, "reverse": (False, True), "backend": "cpu"}
        return lambda: run_with_gradients(inputs, torch.float32, **options)

    def test_any_number_of_threads(self, run):
        before = torch.get_num_threads()
        want = run()
        try:
            for threads in (1, 2, 7, 1):
                torch.set_num_threads(threads)
                got = run()
                assert all(torch.equal(got[name], want[name]) for name in want)
        finally:
            torch.set_num_threads(before)

    def test_laws_of_the_scan(self, scan_inputs, segments):
        inputs = {name: t.float() for name, t in scan_inputs(length=50, channels=20).items()}
        timed = ("u", "dt", "B", "C", "z")

        def cut(span, start):
            part = {name: t[:, span] if name in timed else t for name, t in inputs.items()}
            return selective_scan(**part | {"initial_state": start}, return_last_state=True, backend="cpu")

        whole, last = selective_scan(**inputs, return_last_state=True, backend="cpu")
        first, middle = cut(slice(13), inputs["initial_state"])
        second, end = cut(slice(13, None), middle)
        assert torch.equal(torch.cat([first, second], dim=1), whole)
        assert torch.equal(end, last)
        state = inputs["initial_state"]
        for t in range(50):
            y, state = cut(slice(t, t + 1), state)
            assert torch.equal(y, whole[:, t : t + 1])
        packed = selective_scan(**inputs, seq_idx=segments([13, 37], [13, 37]), backend="cpu")
        assert torch.equal(packed, torch.cat([first, cut(slice(13, None), None)[0]], dim=1))

    @pytest.mark.parametrize(("channels", "size", "groups"), [(40, 16, 1), (36, 5, 2), (33, 24, 3)])
    @pytest.mark.parametrize("dropped", [(), ("D", "z", "dt_bias")])
    def test_steps_are_the_scan(self, scan_inputs, channels, size, groups, dropped):
        made = scan_inputs(
            length=30, channels=channels, size=size, groups=groups, **dict.fromkeys(dropped, False)
        )
        inputs = {name: tensor.float() for name, tensor in made.items()}
        want, last = selective_scan(**inputs, return_last_state=True, backend="cpu")
        state = inputs.pop("initial_state").clone()
        for t in range(30):
            now = {name: x[:, t] if name in ("u", "dt", "B", "C", "z") else x for name, x in inputs.items()}
            assert torch.equal(selective_state_update(state, **now, backend="cpu"), want[:, t])
        assert torch.equal(state, last)

    @pytest.mark.parametrize("taps", [3, 4])
    def test_steps_are_the_convolution(self, taps):
        x, weight, bias = torch.randn(2, 30, 20), torch.randn(20, taps), torch.randn(20)
        options = {"activation": "silu", "return_state": True, "backend": "cpu"}
        want, last = causal_conv1d(x, weight, bias, **options)
        state = torch.zeros(2, taps - 1, 20)
        for t in range(30):
            y, state = causal_conv1d(x[:, t : t + 1], weight, bias, initial_state=state, **options)
            assert torch.equal(y[:, 0], want[:, t])
        assert torch.equal(state, last)

    def test_groups_are_separate_calls(self, scan_inputs):
        inputs = {name: t.float() for name, t in scan_inputs(length=40, channels=36, groups=2).items()}
        y = selective_scan(**inputs, backend="cpu")
        for group in range(2):
            channels = slice(18 * group, 18 * group + 18)
            own = {name: inputs[name][..., channels] for name in ("u", "dt", "z", "D", "dt_bias")}
            own |= {name: inputs[name][:, :, group] for name in ("B", "C")}
            own |= {"A": inputs["A"][channels], "initial_state": inputs["initial_state"][:, channels]}
            assert torch.equal(selective_scan(**own, backend="cpu"), y[..., channels])

    def test_asked_states_are_those_of_shorter_runs(self, scan_inputs):
        inputs = {name: t.float() for name, t in scan_inputs(length=40).items()}
        options = {"return_last_state": True, "backend": "cpu"}
        at = torch.tensor([[0, 15, 16, 39]]).repeat(2, 1)
        _, states = selective_scan(**inputs, state_at=at, **options)
        for slot, end in enumerate(at[0].tolist()):
            shorter = {
                n: t[:, : end + 1] if n in ("u", "dt", "B", "C", "z") else t for n, t in inputs.items()
            }
            assert torch.equal(selective_scan(**shorter, **options)[1], states[:, slot])

    @pytest.mark.parametrize("groups", [1, 2])
    def test_reverse_is_flip(self, scan_inputs, groups):
        inputs = {name: t.float() for name, t in scan_inputs(length=50, channels=40, groups=groups).items()}
        turned = {name: t.flip(1) if name in ("u", "dt", "B", "C", "z") else t for name, t in inputs.items()}
        options = {"return_last_state": True, "backend": "cpu"}
        back, state = selective_scan(**inputs, reverse=True, **options)
        forth, last = selective_scan(**turned, **options)
        assert torch.equal(back, forth.flip(1))
        assert torch.equal(state, last)

    def test_any_number_of_threads_in_the_convolution(self, run_with_gradients):
        inputs = {"x": torch.randn(3, 150, 50), "weight": torch.randn(50, 4), "bias": torch.randn(50)}
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 7, 1):
                torch.set_num_threads(threads)
                options = {"function": causal_conv1d, "activation": "silu", "backend": "cpu"}
                results.append(run_with_gradients(inputs, torch.float32, **options))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(found[name], results[0][name]) for found in results for name in found)

    def test_laws_of_the_convolution(self, segments):
        x, weight, bias = torch.randn(1, 50, 20), torch.randn(20, 4), torch.randn(20)

        def run(x, **options):
            return causal_conv1d(
                x, weight, bias, activation="silu", return_state=True, backend="cpu", **options
            )

        whole, last = run(x)
        first, middle = run(x[:, :13])
        second, end = run(x[:, 13:], initial_state=middle)
        assert torch.equal(torch.cat([first, second], dim=1), whole)
        assert torch.equal(end, last)
        packed, _ = run(x, seq_idx=segments([13, 37]))
        assert torch.equal(packed, torch.cat([first, run(x[:, 13:])[0]], dim=1))
        back, state = run(x, reverse=True)
        forth, other = run(x.flip(1))
        assert torch.equal(back, forth.flip(1))
        assert torch.equal(state, other)


@pytest.mark.ci
@pytest.mark.parametrize("capability", list(ATEN))
def test_laws_at_each_capability_of_torch(capability, record_property):
    """The laws of all backends once more, in a process in which torch itself uses no wider instructions."""
    level = ATEN[capability]
    missing = cpu_build.lacking(level)
    if missing is not None:
        pytest.skip(f"ATEN_CPU_CAPABILITY={capability}: {missing}")
    if capability == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip(f"ATEN_CPU_CAPABILITY={capability}: all other tests run at it")
    switches = {"ATEN_CPU_CAPABILITY": capability, cpu_build.LEVEL_VARIABLE: level, "OMP_NUM_THREADS": "1"}
    found = "import torch; assert torch.backends.cpu.get_cpu_capability().lower() == sys.argv[1]"
    laws = str(Path(__file__).with_name("test_scan_laws.py"))
    code = f"import sys, pytest; {found}; sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', {laws!r}]))"
    done = subprocess.run(
        [sys.executable, "-c", code, capability], env=os.environ | switches, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    record_property("level", f"torch {capability}")
