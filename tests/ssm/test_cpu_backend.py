"""The native CPU backend: its sizes, its determinism, and how it is built (the shared tests cover the rest)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from vlmamba.errors import BackendError
from vlmamba.ssm import ScanSpec, explain, selective_scan
from vlmamba.ssm.backends import cpu, cpu_build
from vlmamba.ssm.registry import choose_backend

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in cpu_build.COMPILERS), reason="there is no C++ compiler"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not built the kernel, and an empty cache folder for it."""
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
    cpu_build.forget()
    yield tmp_path / "cache"
    cpu_build.forget()


@needs_compiler
class TestSizes:
    @pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
    @pytest.mark.parametrize(("length", "channels"), [(1, 40), (3, 5), (33, 17), (64, 34), (130, 20)])
    def test_parity(self, scan_inputs, run_with_gradients, assert_near, size, length, channels):
        inputs = scan_inputs(batch=2, length=length, channels=channels, size=size)
        inputs["A"] = -torch.rand(channels, size, dtype=torch.float64) * 4
        options = {"seq_idx": (torch.rand(2, length) < 0.1).cumsum(1), "reverse": length % 2 == 0}
        options["state_at"] = torch.randint(0, length, (2, 4))
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        got = run_with_gradients(inputs, torch.float32, backend="cpu", **options)
        assert_near(got, want, 5e-6)

    def test_groups_that_no_register_fits(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(batch=3, length=70, channels=57, size=6, groups=3)
        options = {"reverse": (True, False, True), "return_last_state": True}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu", **options), want, 5e-6)

    def test_many_blocks_share_a_unit(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(batch=4, length=40, channels=200, size=5)
        want = run_with_gradients(inputs, torch.float64, backend="reference")
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu"), want, 5e-6)

    @pytest.mark.parametrize("raw", [60.0, 19.0, 0.0, -14.0])
    def test_extreme_time_steps(self, scan_inputs, run_with_gradients, assert_near, raw):
        inputs = scan_inputs(length=40, channels=18, dt_bias=False)
        inputs["dt"] = raw + 0.1 * inputs["dt"]
        want = run_with_gradients(inputs, torch.float64, backend="reference")
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu"), want, 5e-6)

    def test_a_growing_state_is_exact_too(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(length=12)
        inputs["A"] = -inputs["A"] * 0.3
        want = run_with_gradients(inputs, torch.float64, backend="reference")
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu"), want, 5e-6)

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


@needs_compiler
class TestDeterminism:
    @pytest.fixture
    def run(self, scan_inputs, run_with_gradients):
        inputs = scan_inputs(batch=3, length=75, channels=100, size=9, groups=2)
        options = {"return_last_state": True, "reverse": (False, True), "backend": "cpu"}
        return lambda: run_with_gradients(inputs, torch.float32, **options)

    def test_runs_are_equal_for_any_number_of_threads(self, run):
        before = torch.get_num_threads()
        want = run()
        try:
            for threads in (1, 2, 7, 1):
                torch.set_num_threads(threads)
                got = run()
                assert all(torch.equal(got[name], want[name]) for name in want)
        finally:
            torch.set_num_threads(before)

    def test_laws_hold_bit_for_bit(self, scan_inputs, segments):
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


class TestBuild:
    def test_no_compiler_falls_back_with_the_reason(self, fresh, monkeypatch, caplog, tmp_path):
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert choose_backend(ScanSpec()).name == "torch"
        reason = "no C++ compiler found (tried c++, g++, clang++); install one, or set CXX"
        assert cpu.available() == reason
        assert reason in explain()
        assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
            f"no native CPU kernel, backend 'torch' serves instead: {reason}"
        ]
        with pytest.raises(BackendError, match=r"backend 'cpu' .* cannot serve .*no C\+\+ compiler found"):
            selective_scan(*torch.ones(2, 1, 2, 3), torch.ones(3, 1), *torch.ones(2, 1, 2, 1), backend="cpu")

    def test_a_compiler_that_fails_is_quoted(self, fresh, monkeypatch, tmp_path):
        compiler = tmp_path / "cxx"
        compiler.write_text("#!/bin/sh\necho 'no such target' >&2\nexit 3\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        assert cpu.available() == f"{compiler} failed with status 3: no such target"
        assert not list(fresh.glob("*"))

    def test_a_compiler_that_hangs_is_given_up(self, fresh, monkeypatch, tmp_path):
        compiler = tmp_path / "cxx"
        compiler.write_text("#!/bin/sh\nexec sleep 30\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setattr(cpu_build, "TIMEOUT", 0.2)
        assert cpu.available() == f"{compiler} took longer than 0 s"

    @needs_compiler
    def test_a_wrong_kernel_is_not_used(self, fresh, monkeypatch):
        sources = cpu_build._sources()
        monkeypatch.setattr(
            cpu_build,
            "_sources",
            lambda: sources | {"lanes.h": sources["lanes.h"].replace(b"0.693146979f", b"0.7f")},
        )
        assert "the compiled kernel fails its self-check: relative error" in str(cpu.available())

    @needs_compiler
    def test_a_kept_kernel_is_used_and_a_damaged_one_built_again(self, fresh, monkeypatch, caplog):
        assert cpu.available() is True
        (path,) = fresh.glob("*")
        content = path.read_bytes()
        cpu_build.forget()
        with monkeypatch.context() as patch:
            patch.setattr(cpu_build, "_compile", lambda *_: pytest.fail("compiled again"))
            assert cpu.available() is True
        for damage in (b"", b"not a library", content[: len(content) // 2]):
            path.unlink()
            path.write_bytes(damage)
            cpu_build.forget()
            assert cpu.available() is True
            assert len(path.read_bytes()) == len(content)
            assert f"{path} is damaged; it is compiled again" in caplog.text

    @needs_compiler
    def test_a_folder_that_cannot_be_written_is_no_obstacle(self, fresh, caplog):
        fresh.write_text("a file where the folder should be")
        assert cpu.available() is True
        assert "cannot keep the native CPU kernel" in caplog.text

    @needs_compiler
    def test_several_processes_build_at_once(self, fresh):
        code = "from vlmamba.ssm.backends import cpu; print(cpu.available())"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running = [subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(2)]
        assert [process.communicate()[0] for process in running] == ["True\n"] * 2
        assert len(list(fresh.iterdir())) == 1

    def test_nothing_is_built_on_import(self, fresh):
        code = "import vlmamba.ssm.backends.cpu, vlmamba.ssm.backends.cpu_build as b; print(b._loaded)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"
        assert not fresh.exists()
