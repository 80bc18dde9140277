"""Files are whole or not there at all; locks die with their process; JSON errors name the file."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vlmamba.common.files import (
    append_text,
    digest,
    locked,
    read_json,
    replace_json,
    replace_text,
    replaced,
    replaced_directory,
    sweep,
    write_errors,
)
from vlmamba.errors import CheckpointError, ConfigError, DataError, WriteError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


class TestReplacing:
    def test_a_file_is_replaced_and_nothing_else_is_left(self, tmp_path):
        path = tmp_path / "below" / "a.txt"
        replace_text(path, "one\n")
        replace_text(path, "two\n")
        assert path.read_text() == "two\n"
        assert names(path.parent) == ["a.txt"]
        assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def test_json_keeps_letters_and_order(self, tmp_path):
        replace_json(tmp_path / "a.json", {"b": "ä", "a": 1})
        assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": "ä",\n  "a": 1\n}\n'

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
    def test_a_failure_leaves_what_was_there(self, tmp_path, error):
        path = tmp_path / "a.txt"
        path.write_text("before")
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else WriteError
        with pytest.raises(expected) as caught, replaced(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "before"
            raise error
        assert path.read_text() == "before"
        assert names(tmp_path) == ["a.txt"]
        if expected is WriteError:
            assert str(path) in str(caught.value)
            assert "No space left" in str(caught.value)
            assert "GiB free on that disk" in str(caught.value)
            assert isinstance(caught.value, OSError)
            assert isinstance(caught.value, CheckpointError)

    def test_a_folder_that_is_none(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(WriteError, match=r"file/a\.txt failed"):
            replace_text(tmp_path / "file" / "a.txt", "x")
        with pytest.raises(WriteError, match=r"file/a\.txt failed"):
            append_text(tmp_path / "file" / "a.txt", "x")

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_folder_is_replaced_or_stays(self, tmp_path, fails):
        final = tmp_path / "export"
        final.mkdir()
        (final / "old").write_text("old")
        try:
            with replaced_directory(final) as folder:
                (folder / "new").write_text("new")
                assert names(final) == ["old"]
                if fails:
                    raise ValueError("broken off")
        except ValueError:
            assert fails
        assert names(final) == (["old"] if fails else ["new"])
        assert names(tmp_path) == ["export"]

    def test_two_at_once_do_not_share_a_name(self, tmp_path):
        path = tmp_path / "a"
        with replaced(path) as one, replaced(path) as two:
            assert one != two
            one.write_text("one")
            two.write_text("two")
        assert path.read_text() == "one"

    def test_sweep_removes_hidden_names_alone(self, tmp_path):
        for name in (".a.txt.12345678.tmp", "kept.tmp", "below/.b.old", "below/kept"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("")
        (tmp_path / ".dir.12345678.tmp" / "deep").mkdir(parents=True)
        sweep(tmp_path)
        assert names(tmp_path) == ["below", "kept.tmp"]
        assert names(tmp_path / "below") == ["kept"]

    def test_only_failures_of_writing_are_renamed(self, tmp_path):
        with pytest.raises(RuntimeError, match="shapes"), write_errors(tmp_path):
            raise RuntimeError("shapes differ")
        with pytest.raises(WriteError, match="PytorchStreamWriter"), write_errors(tmp_path):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    def test_appended_lines(self, tmp_path):
        append_text(tmp_path / "log" / "a", "one\n")
        append_text(tmp_path / "log" / "a", "two\n", sync=True)
        assert (tmp_path / "log" / "a").read_text() == "one\ntwo\n"


class TestReading:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": 1,}', r"a\.json:1:9 is no JSON"),
            (b'{"a": ', r"a\.json:1:7 is no JSON"),
            (b"", r"a\.json:1:1 is no JSON"),
            (b'{"a": "\xff"}', r"a\.json is no JSON: byte 7 is not UTF-8"),
            (b"[" * 200_000, r"a\.json is nested too deeply"),
        ],
        ids=["comma", "cut", "empty", "bytes", "deep"],
    )
    def test_what_is_wrong_and_where(self, tmp_path, content, message):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_json(tmp_path / "a.json", error=DataError)

    def test_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"a\.json cannot be read: No such file"):
            read_json(tmp_path / "a.json")

    def test_values(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps({"a": [1, None]}))
        assert read_json(tmp_path / "a.json") == {"a": [1, None]}

    def test_a_digest_sees_one_bit(self, tmp_path):
        (tmp_path / "a").write_bytes(b"abc")
        assert digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        (tmp_path / "a").write_bytes(b"abb")
        assert not digest(tmp_path / "a").startswith("ba78")


HOLDER = """
import sys, time
from pathlib import Path
from vlmamba.common.files import locked
with locked(Path(sys.argv[1]), busy="it"):
    print("held", flush=True)
    time.sleep(60)
"""


class TestLock:
    def test_one_at_a_time_until_the_process_is_killed(self, tmp_path):
        path = tmp_path / "run" / ".lock"
        with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            message = rf"the run r is in use by process {holder.pid} on "
            with pytest.raises(ConfigError, match=message), locked(path, busy="the run r"):
                pytest.fail("let in")
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            deadline = time.monotonic() + 10
            while True:  # the system lets go when the process is gone
                try:
                    with locked(path, busy="the run r"):
                        assert f"process {os.getpid()} " in path.read_text()
                    break
                except ConfigError:
                    assert time.monotonic() < deadline
        with locked(path, busy="the run r"):
            pass

    def test_a_folder_that_cannot_be_written_keeps_nobody_out(self, tmp_path):
        (tmp_path / "file").write_text("")
        with locked(tmp_path / "file" / "lock", busy="it"):
            pass


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
