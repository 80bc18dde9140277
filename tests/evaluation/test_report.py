from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlmamba.errors import DataError, MissingFileError
from vlmamba.evaluation.gallery import Shown, Talk, Turn, common_suffix, pick_answers
from vlmamba.evaluation.records import append_records
from vlmamba.evaluation.report import write_report
from vlmamba.evaluation.scorers import rate
from vlmamba.evaluation.scoring import score_records
from vlmamba.evaluation.tables import (
    duration,
    format_results,
    format_runs,
    percent,
    read_run,
    settings_line,
    text_table,
)
from vlmamba.pages import embedded

EVIL = '</style><script>alert(1)</script>"\' onerror="x'
RESULTS = {
    "checkpoint": f"runs/{EVIL}",
    "model": {"parameters": {"vision_tower": 12345, "multi_modal_projector": 7}, "image_tokens": 36},
    "tasks": {
        "demo": {
            "description": EVIL,
            "metrics": {"overall": rate(90, 100), "categories": {"digit": rate(40, 50), EVIL: rate(50, 50)}},
            "counts": {"asked": 100, "answered": 100, "missing": 0, "unparsable": 2, "cut": 0, "resumed": 0},
            "shuffled": {"metrics": {"overall": rate(31, 100), "categories": {}}, "seconds": 60.0},
            "seconds": 61.0,
        }
    },
}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture()
def run(tmp_path):
    folder = tmp_path / "finetune"
    folder.mkdir()
    lines = [{"step": i, "loss": 5 * 0.97**i + 0.02, "seconds": 0.5} for i in range(1, 201)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 201, "loss": NaN}\n{"step": 2'
    (folder / "log.jsonl").write_text(text)
    (folder / "config.yaml").write_text(
        "optim: {name: adamw, lr: 0.002}\nmodel: {connector: {name: vss-l2, options: {scan: csm}}}\n"
    )
    return folder


def shown(**changes):
    defaults = {
        "images": (Image.new("RGB", (4, 4), "red"),),
        "question": "What?",
        "expected": "a",
        "given": "b",
        "right": False,
    }
    return Shown(**{**defaults, **changes})


def test_the_page_holds_everything_and_loads_nothing(tmp_path, run):
    samples = [
        shown(question=f"Question number {i}?\nBe brief.", category=f"kind {i % 2}", right=i > 2)
        for i in range(6)
    ]
    talks = [
        Talk((Image.new("RGB", (4, 4)),), [Turn("And then?", "so", "so", True), Turn("Why?", "free text")])
    ]
    path = write_report(
        tmp_path / "new/report.html",
        title="A title",
        runs=[run],
        results=RESULTS,
        samples=samples,
        conversations=talks,
        settings={"Recipe": "train/x.py"},
        timings=[("set-up", 100.0)],
    )
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "a")
        assert all(not name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import", source)
    for i in range(6):
        assert f"Question number {i}? †" in page.text
    for text in (
        "Be brief.",
        "90.0 %",
        "31.0 %",
        "82.6 – 94.5 %",
        "And then?",
        "free text",
        "vss-l2, scan csm",
        "0.002",
        "train/x.py",
    ):
        assert text in page.text
    assert "asked 100, answered 100, missing 0, unparsable 2" in page.text
    assert "5 min 21 s" in page.text  # 100 s of set-up, 200 half seconds, 61 s and 60 s
    assert "finetune, 200 steps" in page.text
    assert 'content="width=device-width' in source
    assert "prefers-color-scheme: dark" in source


def test_what_models_say_cannot_become_markup(tmp_path, run):
    evil = shown(question=EVIL, expected=EVIL, given=EVIL, category=EVIL, question_id=EVIL)
    talk = Talk((), [Turn(EVIL, EVIL, EVIL, False)])
    path = write_report(
        tmp_path / "r.html",
        title=EVIL,
        subtitle=EVIL,
        runs=[read_run(run, label=EVIL)],
        results=RESULTS,
        samples=[evil],
        conversations=[talk],
        settings={EVIL: EVIL},
        timings=[(EVIL, 1.0)],
    )
    source = path.read_text(encoding="utf-8")
    assert "<script" not in source
    assert 'onerror="' not in source
    assert source.count("</style>") == 1
    assert html.escape("<script>alert(1)</script>") in source
    assert Page(source).text.count("<script>alert(1)</script>") >= 10


def test_a_report_of_one_thing_alone(tmp_path, run):
    assert "Loss" in write_report(tmp_path / "a.html", title="t", runs=[run]).read_text()
    assert "What?" in write_report(tmp_path / "b.html", title="t", samples=[shown()]).read_text()
    with pytest.raises(DataError, match="needs runs, results or samples"):
        write_report(tmp_path / "c.html", title="t")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"no training log .*none.log\.jsonl: give the folder of a run"
    ):
        write_report(tmp_path / "a.html", title="t", runs=[tmp_path / "none"])
    with pytest.raises(
        MissingFileError, match=r"no results .*none: give the folder that an evaluation wrote"
    ):
        write_report(tmp_path / "a.html", title="t", results=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/log.jsonl").write_text('{"step": 1, "loss": null}\n')
    with pytest.raises(DataError, match="no line with a step and a finite loss"):
        read_run(tmp_path / "empty")
    assert not (tmp_path / "a.html").exists()


def test_the_gallery_mixes_right_and_wrong_of_every_kind(task, tmp_path):
    samples = task.samples
    wrong = {0, 2, 4, 6, 8, 10, 1}  # all of "colour", one of "count"
    rows = [
        {"question_id": s.question_id, "prompt": s.text, "text": "no" if s.question_id in wrong else s.answer}
        for s in samples
    ]
    append_records(tmp_path / "p.jsonl", rows)
    records = {(str(row["question_id"]), row["prompt"]): row for row in rows}
    score_records(task, samples, records, tmp_path / "p.jsonl")
    chosen = pick_answers(task, tmp_path / "p.jsonl", per_category=4, wrong=2)
    by_kind = {kind: [s.right for s in chosen if s.category == kind] for kind in ("colour", "count")}
    assert by_kind == {"colour": [False] * 4, "count": [False, True, True, True]}
    assert chosen == pick_answers(task, tmp_path / "p.jsonl", per_category=4, wrong=2)
    append_records(tmp_path / "q.jsonl", [{"question_id": 99, "text": "x"}])
    with pytest.raises(DataError, match="answers none of the questions of 'tiny'"):
        pick_answers(task, tmp_path / "q.jsonl")


def test_pictures_are_embedded_small(tmp_path):
    assert embedded(Image.new("RGB", (8, 8))).startswith("data:image/png;base64,")
    noise = Image.effect_noise((900, 600), 90).convert("RGB")
    noise.save(tmp_path / "n.png")
    uri = embedded(tmp_path / "n.png")
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 120_000


def test_open_pictures_are_not_shrunk_in_place():
    picture = Image.new("RGB", (900, 600))
    embedded(picture)
    assert picture.size == (900, 600)


def test_a_common_last_line():
    assert common_suffix(["a\nBe brief.", "b", "c\nBe brief."]) == "Be brief."
    assert common_suffix(["a\nBe brief.", "b\nBe long."]) == common_suffix(["a"]) == ""


def test_text_for_terminals(run):
    assert text_table(["a", "b"], [["x", "10"], ["long", "9"]]) == "a      b\n----  --\nx     10\nlong   9"
    assert [duration(s) for s in (0.25, 42.4, 61, 3725)] == ["0.2 s", "42 s", "1 min 01 s", "1 h 02 min"]
    assert percent(None) == "–"
    log = read_run(run)
    assert (log.steps, log.seconds) == (200, 100.0)
    assert "finetune    200       4.870      0.0" in format_runs([log])


def headline(name, value, references, **changes):
    return {
        "headline": {"name": name, "value": value, "unit": changes.pop("unit", "%")},
        "references": [{"model": m, "value": v, "source": "its paper"} for m, v in references],
        "metrics": {"overall": rate(50, 100), "categories": {}},
        "counts": {"asked": 100, "answered": 97, "missing": 3, "unparsable": 1, "cut": 0, "resumed": 0},
        "settings": {
            "model": "abcd",
            "data": "ef01",
            "dtype": "float32",
            "max_new_tokens": 16,
            "batch_size": 4,
        },
        "seconds": 1.0,
        **changes,
    }


BENCHMARKS = {
    "model": {"fingerprint": "abcd", "dtype": "float32"},
    "checkpoint": "runs/x",
    "tasks": {
        "pope": headline("POPE mean F1", 80.0, [("LLaVA-1.5-7B", 85.9), ("VL-Mamba 2.8B", 84.4)]),
        "mme": headline("MME perception", 1000.0, [("LLaVA-1.5-7B", 1510.7)], unit="points"),
        "vqav2": headline(
            "VQA accuracy", None, [], submission={"file": "vqav2.submission.json", "why": None}
        ),
    },
}


def test_every_benchmark_has_a_bar_and_published_figures_are_lines(tmp_path):
    page = Page(write_report(tmp_path / "r.html", title="t", results=BENCHMARKS, samples=[]).read_text())
    assert [a["style"] for t, a in page.tags if t == "i"][:2] == ["width:80.0%", "width:50.0%"]
    lines = [(a["style"], a["title"]) for t, a in page.tags if t == "b" and "title" in a]
    assert lines == [
        ("left:85.9%", "LLaVA-1.5-7B 85.9"),
        ("left:84.4%", "VL-Mamba 2.8B 84.4"),
        ("left:75.53%", "LLaVA-1.5-7B 1510.7"),
    ]
    for text in (
        "1000.0 points",
        "asked 100, answered 97, missing 3, unparsable 1",
        "greedy, at most 16 new tokens, batches of 4, float32; model abcd, data ef01",
        "Weights abcd (float32) of runs/x",
        "for the server: vqav2.submission.json",
    ):
        assert text in page.text


def test_one_task_without_published_figures_needs_no_bars(tmp_path):
    alone = {**BENCHMARKS, "tasks": {"vqav2": BENCHMARKS["tasks"]["vqav2"]}}
    page = Page(write_report(tmp_path / "r.html", title="t", results=alone, samples=[]).read_text())
    assert "Benchmarks" not in page.text


def test_the_same_figures_in_a_terminal():
    text = format_results(BENCHMARKS)
    assert "pope: POPE mean F1 80.0 % (LLaVA-1.5-7B 85.9, VL-Mamba 2.8B 84.4)" in text
    assert "vqav2: VQA accuracy –\n" in text
    likelihood = {
        "method": "likelihood",
        "rank_by": "mean",
        "limit": 5,
        "dtype": "float32",
        "model": 1,
        "data": 2,
    }
    assert settings_line(likelihood) == (
        "options ranked by the mean of their tokens' log-probabilities, first 5 questions, float32; model 1, data 2"
    )


def test_answers_that_only_a_server_can_judge_are_neither_right_nor_wrong(tmp_path):
    page = write_report(
        tmp_path / "r.html", title="t", samples=[shown(right=None, given="perhaps")]
    ).read_text()
    assert "1 shown; only the benchmark&#39;s server knows which are right" in page
    assert "✓" not in page.split("</style>")[1]
    assert "✗" not in page.split("</style>")[1]
