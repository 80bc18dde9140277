"""What goes wrong while a run reads its data: each case counted or named, never a hang."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import FakeProcessor, WriteRows, chat, many_rows
from vlmamba.data import PlanSettings, VLDataset, build_loader, compute_lengths
from vlmamba.errors import DataError

SETTINGS = PlanSettings(step_samples=8, micro_samples=4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("half", r"image .*broken\.png is corrupt or cut off"),
        (b"", r"broken\.png is empty \(0 bytes\)"),
        (None, r"image .*broken\.png does not exist"),
        (b"<html>404</html>", r"is cut off or not a picture .* begins with b'<html>404</"),
    ],
    ids=["truncated", "empty", "missing", "a web page"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_picture_is_replaced_counted_and_listed(
    write: WriteRows,
    processor: FakeProcessor,
    root: Path,
    tmp_path: Path,
    content: Any,
    reason: str,
    num_workers: int,
) -> None:
    if content == "half":
        from PIL import Image

        Image.effect_noise((64, 64), 50).save(root / "broken.png")
        content = (root / "broken.png").read_bytes()[:1500]
    if content is not None:
        (root / "broken.png").write_bytes(content)
    rows = many_rows(30)
    rows[4]["image"] = "broken.png"
    data = VLDataset(write(rows), processor, max_length=64)
    listed = tmp_path / "bad_samples.jsonl"
    table = compute_lengths(data, progress=False)
    loader = build_loader(data, SETTINGS, lengths=table, bad_samples_path=listed, num_workers=num_workers)
    steps = list(loader)
    assert sum(step.num_samples for step in steps) == 30
    assert sum(step.events.get("replaced", 0) for step in steps) == 1
    (record,) = loader.bad_samples.records.values()
    assert (record["id"], record["kind"]) == ("r4", "image")
    assert re.search(reason, record["reason"])
    assert '"id": "r4"' in listed.read_text()


def test_rows_of_another_schema_are_counted_until_the_budget_is_used_up(
    write: WriteRows, processor: FakeProcessor
) -> None:
    rows = many_rows(40)
    rows[3] = {"image_id": 7, "question": "q", "answer": "a"}
    data = VLDataset(write(rows), processor)
    loader = build_loader(data, SETTINGS, lengths=compute_lengths(data, progress=False))
    assert sum(step.num_samples for step in loader) == 39
    for i in range(12):
        rows[i] = {"question": "q", "answer": "a"}
    data = VLDataset(write(rows), processor)
    with pytest.raises(DataError) as caught:
        build_loader(data, SETTINGS, lengths=compute_lengths(data, progress=False))
    message = str(caught.value)
    assert (
        "12 of 40 rows cannot be used (12 shape), more than the 4 that max_bad_fraction=0.001 allows"
        in message
    )
    assert "has no 'conversations' (and no 'messages'); its keys are ['answer', 'question']" in message


class Slow(FakeProcessor):
    """Gives a killer time."""

    def encode_messages(self, *args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return super().encode_messages(*args, **kwargs)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_a_clear_error_and_no_hang(write: WriteRows, victim: int) -> None:
    rows = [{"id": i, "conversations": chat("q", "a" * 5)} for i in range(120)]
    loader = build_loader(VLDataset(write(rows), Slow()), SETTINGS, num_workers=2, prefetch_factor=1)
    steps = iter(loader)
    next(steps)
    worker = loader._loader._iterator._workers[victim]  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"(?s)a process that loads data ended without a word.*lower data\.num_workers"
    ):
        for _ in steps:
            pass
    assert time.monotonic() - started < 15
    assert loader._loader._iterator is None, "the other worker is stopped too"
    position = loader.position
    assert next(step.index for step in loader) == position, "and the loader can go on"
    loader.close()
