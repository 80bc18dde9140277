"""Compiles the native CPU kernel on first use, keeps it in a cache folder and loads it.

The cache folder is $VLMAMBA_CACHE, by default ~/.cache/vlmamba. A library there is named after everything it
depends on (source, flags, compiler, level, processor), ends with a digest of itself, and is put in place by one
rename; so several processes may build at once and a damaged file is noticed and built again.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

from vlmamba.common.files import cache_folder, replaced
from vlmamba.ssm.registry import forget_choices

logger = logging.getLogger(__name__)

LEVEL_VARIABLE = "VLMAMBA_CPU_LEVEL"
NATIVE = "native"
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 300.0
"""Seconds a compiler may take; it needs two or three, but the machine may be busy."""

_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-w")
_EXTRAS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
"""Tried in this order, until the compiler accepts one."""
_V2 = ("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3")
_V3 = (*_V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
LEVELS = {"x86-64-v2": _V2, "x86-64-v3": _V3, "x86-64-v4": _V4}
"""Levels of the x86-64 psABI (section 3.1.1), and what /proc/cpuinfo says of a processor that has them."""
_DIGEST = hashlib.sha256().digest_size

Library = ctypes.CDLL
_lock = threading.Lock()
_loaded: list[Library | str] = []


class _BuildError(Exception):
    """Why there is no library, in words for the user."""


def load(check: Callable[[Library], str | None]) -> Library | str:
    """The compiled kernel, or the reason why there is none. Built and checked once in a process.

    Args:
        check: Prepares a library just loaded and tests it: None, or what is wrong with it.
    """
    with _lock:
        if not _loaded:
            try:
                _loaded.append(_build_and_load(check))
            except _BuildError as error:
                logger.warning("no native CPU kernel, backend 'torch' serves instead: %s", error)
                _loaded.append(str(error))
        return _loaded[0]


def forget() -> None:
    """Let the next `load` start afresh."""
    with _lock:
        _loaded.clear()
    forget_choices()


def find_compiler() -> list[str]:
    """The command of the system's C++ compiler: $CXX, else the first found of `COMPILERS`.

    Raises:
        _BuildError: There is none.
    """
    wanted = os.environ.get("CXX", "").strip()
    for command in [wanted] if wanted else COMPILERS:
        words = shlex.split(command)
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return [path, *words[1:]]
    tried = f"CXX={wanted}" if wanted else ", ".join(COMPILERS)
    raise _BuildError(f"no C++ compiler found (tried {tried}); install one, or set CXX")


def level() -> str:
    """What the kernel is compiled for: $VLMAMBA_CPU_LEVEL, one of `LEVELS`, or "native", this very processor."""
    return os.environ.get(LEVEL_VARIABLE, "").strip() or NATIVE


def lacking(level: str) -> str | None:
    """What this processor lacks for a level, in words; None when it lacks nothing."""
    lines = [line.partition(":") for line in _processor().splitlines()]
    have = {flag for name, _, flags in lines if name.strip() == "flags" for flag in flags.split()}
    missing = [flag for flag in LEVELS[level] if flag not in have]
    return f"this processor has no {', '.join(missing)}" if missing else None


def _extras() -> tuple[tuple[str, ...], ...]:
    """The flags that go with the level, in the order in which they are tried.

    Raises:
        _BuildError: There is no such level, or the processor does not have it.
    """
    wanted = level()
    if wanted == NATIVE:
        return _EXTRAS
    if wanted not in LEVELS:
        known = ", ".join((NATIVE, *LEVELS))
        raise _BuildError(f"{LEVEL_VARIABLE} is {wanted!r}; it must be one of {known}")
    trouble = lacking(wanted)
    if trouble is not None:
        raise _BuildError(f"{LEVEL_VARIABLE} is {wanted}, but {trouble}; choose a lower one, or {NATIVE}")
    return (f"-march={wanted}", "-fopenmp"), (f"-march={wanted}",)


def _build_and_load(check: Callable[[Library], str | None]) -> Library:
    compiler = find_compiler()
    sources = _sources()
    name = f"scan-{_key(compiler, sources)}.so"
    content: bytes | None = None
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / name
        library = _open(path) if path.is_file() else None
        if library is None:
            content = _compile(compiler, sources)
            with replaced(path) as temporary:
                temporary.write_bytes(content)
                temporary.chmod(0o700)
            library = _open(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        logger.warning("cannot keep the native CPU kernel (%s); it is compiled for this process alone", error)
        library = None
    if library is None:
        library = _open_privately(content or _compile(compiler, sources), name)
    wrong = check(library)
    if wrong is not None:
        raise _BuildError(f"the compiled kernel fails its self-check: {wrong}")
    return library


def _sources() -> dict[str, bytes]:
    folder = resources.files("vlmamba.ssm") / "native"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return {file.name: file.read_bytes() for file in files if file.name.endswith((".h", ".cpp"))}


def _key(compiler: list[str], sources: dict[str, bytes]) -> str:
    """Names everything a compiled library depends on."""
    stat = Path(compiler[0]).resolve().stat()
    digest = hashlib.sha256()
    for part in (
        repr((sources, _FLAGS, _extras(), compiler, stat.st_size, stat.st_mtime_ns)),
        repr((platform.system(), platform.machine())),
        _processor(),
    ):
        digest.update(part.encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """The processor's model and instruction sets, since code is compiled for exactly this one."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.processor()} {torch.backends.cpu.get_cpu_capability()}"
    return "\n".join(line for line in lines if line.startswith(wanted))


def _compile(compiler: list[str], sources: dict[str, bytes]) -> bytes:
    """The library, with its digest at the end."""
    with tempfile.TemporaryDirectory(prefix="vlmamba-") as folder:
        for name, text in sources.items():
            (Path(folder) / name).write_bytes(text)
        out = Path(folder) / "scan.so"
        trouble = ""
        for extras in _extras():
            command = [*compiler, *_FLAGS, *extras, str(Path(folder) / "scan.cpp"), "-o", str(out)]
            try:
                done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
            except subprocess.TimeoutExpired:
                raise _BuildError(f"{compiler[0]} took longer than {TIMEOUT:.0f} s") from None
            except OSError as error:
                raise _BuildError(f"{compiler[0]} does not run: {error}") from None
            if done.returncode == 0 and out.is_file():
                content = out.read_bytes()
                return content + hashlib.sha256(content).digest()
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            trouble = trouble or f"{compiler[0]} failed with status {done.returncode}: " + " | ".join(
                said[-3:]
            )
    raise _BuildError(trouble)


def _open(path: Path) -> Library | None:
    """The library at `path`, or None when it is damaged or does not load."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
        logger.warning("%s is damaged; it is compiled again", path)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s does not load (%s); it is compiled again", path, error)
        return None


def _open_privately(content: bytes, name: str) -> Library:
    """Load a library from a folder of its own that does not outlive this call."""
    with tempfile.TemporaryDirectory(prefix="vlmamba-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise _BuildError(f"the compiled kernel does not load: {error}") from None
