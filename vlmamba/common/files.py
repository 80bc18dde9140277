"""Files that are whole or not there at all, and JSON that is read with its name in every error.

Whatever is written for good goes under a hidden name beside its target (``.NAME.xxxxxxxx.tmp``), is waited for until
its bytes are on the disk, and is then renamed: a crash, a kill or a full disk leaves what was there before. What a
killed process leaves under a hidden name, `sweep` removes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vlmamba.errors import CheckpointError, ConfigError, VLMambaError, WriteError


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` when the block ends well.

    Args:
        path: The file; its folder is made when needed.

    Raises:
        WriteError: The disk is full, read-only or otherwise fails; `path` is as it was.
    """
    path = Path(path)
    temporary = _hidden(path)
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync_file(temporary)
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def replace_text(path: str | Path, text: str) -> None:
    """Replace a text file (UTF-8) as a whole.

    Raises:
        WriteError: As `replaced`.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_json(path: str | Path, value: Any, *, indent: int | None = 2, sort_keys: bool = False) -> None:
    """Replace a JSON file as a whole.

    Raises:
        WriteError: As `replaced`.
    """
    replace_text(path, json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False) + "\n")


@contextmanager
def replaced_directory(path: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` when the block ends well.

    An existing folder of that name is replaced in two renames, and stays when writing fails.

    Raises:
        WriteError: As `replaced`.
    """
    path = Path(path)
    temporary, old = _hidden(path), _hidden(path)
    try:
        with write_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_directory(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    sync_directory(path.parent)


def append_text(path: str | Path, text: str, *, sync: bool = False) -> None:
    """Add text to the end of a file; its folder and the file are made when needed.

    Args:
        path: The file.
        text: Whole lines, as a rule.
        sync: Whether to wait until they are on the disk.

    Raises:
        WriteError: The system refused it; part of the text may be there.
    """
    path = Path(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if sync:
                os.fsync(file.fileno())


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system, torch and safetensors raise when a write fails into one error that names the file.

    Raises:
        WriteError: With the file, what the system said and the room on that disk.
    """
    try:
        yield
    except VLMambaError:
        raise
    except OSError as error:
        raise write_failure(path, error) from error
    except Exception as error:
        # torch and safetensors wrap what the system said in errors of their own.
        if any(
            part in str(error)
            for part in (
                "No space left",
                "I/O error",
                "iostream error",
                "PytorchStreamWriter",
                "unexpected pos",
            )
        ):
            raise write_failure(path, error) from error
        raise


def write_failure(path: Path, error: BaseException) -> WriteError:
    """The error for a write that the system refused."""
    folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    room = ""
    with contextlib.suppress(OSError):
        room = f" ({shutil.disk_usage(folder).free / 2**30:.2f} GiB free on that disk)"
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return WriteError(
        f"writing {path} failed: {said}{room}. What was there before is unharmed, and nothing unfinished was left "
        "under that name. Make room or choose another place, then start again (a training run with --resume)."
    )


def sweep(folder: Path, *, below: bool = True) -> None:
    """Remove what a killed process left under hidden names in a folder, and below it or not.

    Only for a folder that this process alone writes to (see `locked`).
    """
    pattern = "**/.*" if below else ".*"
    for left in [*folder.glob(f"{pattern}.tmp"), *folder.glob(f"{pattern}.old")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: str | Path, *, error: type[VLMambaError] = CheckpointError) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        error: The class to raise.

    Raises:
        VLMambaError: Of that class: the file cannot be read, is not UTF-8 or not JSON, or is nested too deeply; the
            message has the file, and where in it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror or failure}.") from failure
    except UnicodeDecodeError as failure:
        raise error(
            f"{path} is no JSON: byte {failure.start} is not UTF-8. The file is damaged."
        ) from failure
    except json.JSONDecodeError as failure:
        where = f"{path}:{failure.lineno}:{failure.colno}"
        raise error(f"{where} is no JSON: {failure.msg}. The file is cut off or damaged.") from failure
    except RecursionError as failure:
        raise error(
            f"{path} is nested too deeply to be read. The file is damaged, or not what it says."
        ) from failure


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where results are kept that take long and can be computed again: ``$VLMAMBA_CACHE``, or ``~/.cache/vlmamba``.

    Raises:
        RuntimeError: There is no home folder.
    """
    return Path(os.environ.get("VLMAMBA_CACHE") or Path.home() / ".cache" / "vlmamba").expanduser()


@contextmanager
def locked(path: Path, *, busy: str | None, error: type[VLMambaError] = ConfigError) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    The file stays, and says who holds it or held it last. Children that this process forks (data workers) do not hold
    it. On NFS, Linux makes it a lock of the server, which holds for all hosts and ends with the process as well (not
    under the mount option nolock or local_lock=flock: there it holds for one host). Where the system has no such locks,
    or the folder cannot be written, nobody is kept out.

    Args:
        path: The lock file; its folder is made when needed.
        busy: What is taken, in words ("the run folder runs/a"); None to wait instead.
        error: The class to raise.

    Raises:
        VLMambaError: Of that class: another process holds it; the message says which.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        file = None
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
        if file is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy is not None else 0))
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise error(
                    f"{busy} is in use by {holder}. Wait until it ends, or choose another folder."
                ) from None
            except OSError:  # a file system without locks
                pass
            else:
                _let_go_in_children()
                _held.add(file)
                stack.callback(_held.discard, file)
                with contextlib.suppress(OSError):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                    file.flush()
        yield


_held: set[TextIO] = set()
"""The locks of this process."""


@functools.cache
def _let_go_in_children() -> None:
    """A lock lives as long as any process has it open: one that is forked closes it, so that it ends with this one."""

    def close() -> None:
        while _held:
            _held.pop().close()

    os.register_at_fork(after_in_child=close)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
