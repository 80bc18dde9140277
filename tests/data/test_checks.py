"""`check` in several processes, cleaned annotations, samples shown, lengths and paddings told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import WriteRows, chat, many_rows
from vlmamba.cli import main
from vlmamba.data import LengthTable, LLaVASource, VLDataset, check, write_clean
from vlmamba.data.show import as_html, as_text, look_at
from vlmamba.data.stats import histogram, layouts, stats_text
from vlmamba.errors import ConfigError
from vlmamba.testing import tiny_processor


@pytest.fixture
def broken(write: WriteRows, root: Path) -> LLaVASource:
    """A hundred rows, five of which cannot be used, two of which are repaired."""
    rows: list[Any] = many_rows(100)
    rows[10]["image"] = "gone.png"
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:50])
    rows[20]["image"] = "cut.png"
    rows[30] = {"question": "q"}
    rows[70] = "not a row"
    rows[80]["image"] = "../outside.png"
    rows[40]["conversations"] = chat("q", "")
    rows[40].pop("image", None)
    rows[91]["image"] = "a.jpg"
    return write(rows)


def test_several_processes_find_what_one_finds(broken: LLaVASource) -> None:
    alone, shared = check(broken), check(broken, num_workers=2)
    assert alone == shared
    assert [problem.row for problem in shared.problems] == [10, 20, 30, 70, 80]
    assert (shared.rows, shared.events["empty_answer"], shared.events["image_suffix_replaced"]) == (100, 1, 1)
    text = shared.text()
    assert "5 rows that cannot be used" in text
    assert "3 image" in text and "2 shape" in text
    assert "rows.json:row 70 (id None): the row is a string" in text


@pytest.mark.parametrize("name", ["clean.json", "clean.jsonl"])
def test_cleaned_annotations_hold_every_other_row_as_it_was(
    broken: LLaVASource, root: Path, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "out" / name
    assert write_clean(broken, check(broken), target) == 95
    clean = LLaVASource(target, root)
    kept = [row for row in range(100) if row not in (10, 20, 30, 70, 80)]
    assert [clean.rows[i] for i in range(95)] == [broken.rows[row] for row in kept]
    assert check(clean).ok
    with pytest.raises(ConfigError, match="is there already; name another file"):
        write_clean(broken, check(broken), target)
    assert not list(target.parent.glob(".*"))


def test_the_command_checks_lists_and_cleans(
    broken: LLaVASource, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "check", str(broken.rows.path), "--images", str(root), "--workers", "1"]
    listed, clean = tmp_path / "problems.jsonl", tmp_path / "clean.json"
    assert main([*words, "--list", str(listed), "--clean", str(clean)]) == 1
    assert "95 rows are in" in capsys.readouterr().out
    problems = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(p["row"], p["kind"]) for p in problems] == [
        (10, "image"),
        (20, "image"),
        (30, "shape"),
        (70, "shape"),
        (80, "image"),
    ]
    assert main(["data", "check", str(clean), "--images", str(root), "--workers", "1"]) == 0
    assert main([*words, "--limit", "5", "--clean", str(tmp_path / "x.json")]) == 2
    assert "leave out --limit" in capsys.readouterr().err


def test_a_file_cut_in_the_middle_is_named_by_the_command(
    broken: LLaVASource, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken.rows.path
    path.write_bytes(path.read_bytes()[:5000])
    assert main(["data", "check", str(path)]) == 2
    error = capsys.readouterr().err
    assert "is not a valid JSON list: at row" in error
    assert "Traceback" not in error


# --- show ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(write: WriteRows) -> VLDataset:
    rows = [
        {"id": "x", "image": "a.png", "conversations": chat("<image>\nWhat is <b>?", "Two. <i>")},
        {"id": "bad", "conversations": []},
    ]
    return VLDataset(write(rows), tiny_processor(), max_length=200)


def test_what_is_learnt_is_marked(shown: VLDataset) -> None:
    sample = look_at(shown, 0)
    kinds = [piece.kind for piece in sample.pieces]
    assert kinds == ["text", "image", "text", "learnt"]
    assert sample.pieces[1].tokens == 16
    learnt = sample.pieces[3].text
    assert learnt.strip().startswith("Two.")
    assert learnt.endswith("<|endoftext|>")
    assert f"{sample.pieces[3].tokens} learnt" in sample.title
    plain = as_text(sample, color=False)
    assert f"[[{learnt}]]" in plain
    assert "<16 image tokens>" in plain
    assert "a.png" in plain
    assert f"\x1b[32m{learnt}\x1b[0m" in as_text(sample, color=True)


def test_a_page_is_escaped_and_has_the_pictures(shown: VLDataset) -> None:
    page = as_html([look_at(shown, 0), look_at(shown, 1)], title="a <title>")
    body = page.partition("</style>")[2]
    assert "<b>" not in body and "<i>" not in body
    assert "&lt;b&gt;" in body and "&lt;i&gt;" in body
    assert 'src="data:image/' in page
    assert "cannot be used: shape: &#39;conversations&#39; is empty" in page
    assert "a &lt;title&gt;" in page


def test_tokens_need_a_model(broken: LLaVASource, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(broken.rows.path)]) == 2
    assert (
        "give --processor RUN (a finished run or an exported model), or a recipe" in capsys.readouterr().err
    )


# --- stats --------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
LENGTHS = np.clip(RNG.lognormal(6, 0.6, 2000), 20, 2048).astype(np.int64)
IMAGES = (RNG.random(2000) < 0.9).astype(np.int64)


def test_packing_to_8k_pads_less_than_3_percent() -> None:
    found = layouts(LENGTHS, IMAGES, step_samples=128, micro_samples=16, pack_lengths=[1024, 8192], ranks=8)
    assert [layout.name.split(",")[0] for layout in found] == ["padded"] * 3 + ["packed to 8"] * 2
    naive, grouped, _, packed, by_tokens = found
    assert by_tokens.padding < 0.03 and by_tokens.idle < 0.06
    assert packed.padding < 0.03
    assert packed.padding < grouped.padding < naive.padding
    assert packed.idle < 0.06 < naive.idle


def test_histograms_count_every_row() -> None:
    rows = histogram(LENGTHS)
    assert sum(count for _, _, count in rows) == 2000
    assert all((low <= LENGTHS).sum() >= count and high > low for low, high, count in rows)
    assert [low for low, _, _ in rows][1:] == [high for _, high, _ in rows][:-1]


def test_the_text_says_what_is_in_the_table() -> None:
    values = np.stack([LENGTHS, IMAGES, LENGTHS // 4, np.zeros(2000, dtype=np.int64)], axis=1)
    values[:3] = [[0, 0, 0, 1], [0, 0, 0, 2], [100, 1, 25, 0]]
    found = layouts(LENGTHS, IMAGES, step_samples=128, micro_samples=16, pack_lengths=[4096])
    text = stats_text(LengthTable(values), found, title="Rows of x", ranks=1)
    assert "2,000 rows, 1,998 usable (1 bad, 1 too long)" in text
    assert "packed to 4,096, random order" in text
    assert f"longest {LENGTHS.max():,}" in text
