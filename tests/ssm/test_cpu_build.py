"""How the native CPU kernel is built, kept and given up."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmamba.cli import info
from vlmamba.errors import BackendError
from vlmamba.ssm import ScanSpec, explain, selective_scan
from vlmamba.ssm.backends import cpu, cpu_build
from vlmamba.ssm.registry import choose_backend

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in cpu_build.COMPILERS), reason="there is no C++ compiler"
)


@pytest.fixture(scope="module")
def content():
    """A compiled kernel."""
    return cpu_build._compile(cpu_build.find_compiler(), cpu_build._sources())


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not built the kernel, and an empty cache folder for it."""
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
    cpu_build.forget()
    yield tmp_path / "cache"
    cpu_build.forget()


def test_no_compiler_falls_back_with_the_reason(fresh, monkeypatch, caplog, tmp_path):
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


def test_a_compiler_that_fails_is_quoted_also_by_info(fresh, monkeypatch, tmp_path, capsys):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho 'no such target' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    reason = f"{compiler} failed with status 3: no such target"
    assert cpu.available() == reason
    assert not list(fresh.glob("*"))
    assert info.run([]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"  cpu +{re.escape(reason)}", said)
    assert re.search(r"\* torch +can serve", said)


def test_a_compiler_that_hangs_is_given_up(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\nexec sleep 30\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpu_build, "TIMEOUT", 0.2)
    assert cpu.available() == f"{compiler} took longer than 0 s"


@needs_compiler
def test_a_level_is_kept_or_refused(fresh, monkeypatch):
    monkeypatch.setenv("VLMAMBA_CPU_LEVEL", "v3")
    assert cpu.available() == (
        "VLMAMBA_CPU_LEVEL is 'v3'; it must be one of native, x86-64-v2, x86-64-v3, x86-64-v4"
    )
    cpu_build.forget()
    monkeypatch.setenv("VLMAMBA_CPU_LEVEL", "x86-64-v4")
    with monkeypatch.context() as patch:
        patch.setattr(cpu_build, "_processor", lambda: f"flags : {' '.join(cpu_build.LEVELS['x86-64-v3'])}")
        assert cpu.available() == (
            "VLMAMBA_CPU_LEVEL is x86-64-v4, but this processor has no avx512bw, avx512cd, avx512dq, avx512f, "
            "avx512vl; choose a lower one, or native"
        )
    assert not list(fresh.glob("*"))


@needs_compiler
@pytest.mark.skipif(cpu_build.lacking("x86-64-v2") is not None, reason="this is no x86-64-v2 processor")
@pytest.mark.ci
def test_each_level_is_a_library_of_its_own(fresh, monkeypatch, capsys):
    for level in ("", "x86-64-v2"):
        monkeypatch.setenv("VLMAMBA_CPU_LEVEL", level)
        cpu_build.forget()
        assert cpu.available() is True
    assert len(list(fresh.iterdir())) == 2
    assert info.run([]) == 0
    assert "native kernel: 4 numbers a vector, compiled for x86-64-v2" in capsys.readouterr().out


@needs_compiler
def test_a_wrong_kernel_is_not_used(fresh, monkeypatch):
    sources = cpu_build._sources()
    monkeypatch.setattr(
        cpu_build,
        "_sources",
        lambda: sources | {"lanes.h": sources["lanes.h"].replace(b"0.693146979f", b"0.7f")},
    )
    assert "the compiled kernel fails its self-check: relative error" in str(cpu.available())


@needs_compiler
def test_a_kept_kernel_is_used_and_a_damaged_one_built_again(fresh, content, monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: compiled.append(1) or content)
    assert cpu.available() is True
    (path,) = fresh.glob("*")
    cpu_build.forget()
    assert cpu.available() is True
    assert len(compiled) == 1
    for damage in (b"", b"not a library", content[: len(content) // 2]):
        path.unlink()
        path.write_bytes(damage)
        cpu_build.forget()
        assert cpu.available() is True
        assert path.read_bytes() == content
        assert f"{path} is damaged; it is compiled again" in caplog.text
    assert len(compiled) == 4


@needs_compiler
def test_a_folder_that_cannot_be_written_is_no_obstacle(fresh, content, monkeypatch, caplog):
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: content)
    fresh.write_text("a file where the folder should be")
    assert cpu.available() is True
    assert "cannot keep the native CPU kernel" in caplog.text


@needs_compiler
def test_a_folder_for_reading_only(fresh, content, monkeypatch, caplog):
    compiled = []
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: compiled.append(1) or content)

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(cpu_build, "replaced", refuse)
        assert cpu.available() is True
    assert "cannot keep the native CPU kernel ([Errno 13] Permission denied)" in caplog.text
    assert not list(fresh.iterdir())
    assert len(compiled) == 1
    cpu_build.forget()
    assert cpu.available() is True
    cpu_build.forget()
    monkeypatch.setattr(cpu_build, "replaced", refuse)
    assert cpu.available() is True
    assert len(compiled) == 2


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write to is in /proc")
def test_a_folder_that_nobody_can_write_to(fresh, content, monkeypatch, caplog):
    monkeypatch.setattr(cpu_build, "_compile", lambda *_: content)
    monkeypatch.setenv("VLMAMBA_CACHE", "/proc/self/vlmamba")
    assert cpu.available() is True
    assert "cannot keep the native CPU kernel ([Errno" in caplog.text


@needs_compiler
@pytest.mark.parametrize("number", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.ci
def test_several_processes_build_at_once(fresh, number):
    code = "from vlmamba.ssm.backends import cpu; print(cpu.available())"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) for _ in range(number)
    ]
    assert [process.communicate()[0] for process in running] == ["True\n"] * number
    assert len(list(fresh.iterdir())) == 1


def test_nothing_is_built_on_import(fresh):
    code = "import vlmamba.ssm.backends.cpu, vlmamba.ssm.backends.cpu_build as b; print(b._loaded)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert not fresh.exists()
