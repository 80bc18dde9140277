"""What `data check` says of a row is what training does with it, whatever the row holds."""

from __future__ import annotations

import copy
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import WriteRows, chat
from vlmamba.cli import main
from vlmamba.data import (
    LLaVASource,
    PlanSettings,
    RowError,
    VLDataset,
    build_loader,
    check,
    compute_lengths,
    parse_row,
)
from vlmamba.data.shards import ShardSource, ShardStream
from vlmamba.errors import ConfigError, DataError
from vlmamba.testing import tiny_model, tiny_processor


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


PICTURE = {"type": "image"}
GOOD: dict[str, dict[str, Any]] = {
    "an image, none of images": {"image": "a.png", "images": [], "conversations": chat("<image>q", "a")},
    "no image, images": {"image": [], "images": ["a.png"], "conversations": chat("<image>q", "a")},
    "both the same": {"image": "a.png", "images": ["a.png"], "conversations": chat("<image>q", "a")},
    "no conversations, messages": {"conversations": None, "messages": turns("q", "a")},
    "index": {
        "images": ["a.png", "b.png"],
        "messages": turns(
            [
                {**PICTURE, "index": 1, "text": None},
                {**PICTURE, "index": 0, "text": None},
                text("q", index=None),
            ],
            "a",
        ),
    },
    "one picture twice": {
        "images": ["a.png"],
        "messages": turns([{**PICTURE, "index": 0}, {**PICTURE, "index": 0}], "a"),
    },
    "loss of one": {"conversations": [*chat("q"), {"from": "gpt", "value": "a", "loss": True}]},
    "weight of null": {"conversations": [*chat("q"), {"from": "gpt", "value": "a", "weight": None}]},
    "a word in angles": {"conversations": chat("What does <video> mean in HTML?", "a tag")},
    "no video": {"video": None, "videos": [], "conversations": chat("q", "a")},
    "other keys": {"weight": "70 kg", "conversations": chat("q", "a"), "\ud800": "\ud800"},
}


def answered(**more: Any) -> dict[str, Any]:
    """A row whose answer has further keys."""
    return {"conversations": [*chat("q"), {"from": "gpt", "value": "a", **more}]}


def indexed(*numbers: Any, images: tuple[str, ...] = ("a.png",)) -> dict[str, Any]:
    """A row whose image parts have these indices."""
    return {"images": list(images), "messages": turns([{**PICTURE, "index": i} for i in numbers], "a")}


TEXT = {"conversations": chat("q", "a")}
SEEN = chat("<image>q", "a")
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "images differ": ({"image": "a.png", "images": ["b.png"], "conversations": SEEN}, "shape", "they differ"),
    "video": ({"video": "v.mp4", "conversations": chat("<video>\nq", "a")}, "video", "the row has 'video'"),
    "videos": ({"videos": ["v.mp4"], **TEXT}, "video", "the row has 'videos'"),
    "video token": ({"conversations": chat("q\n<video>", "a")}, "video", "has <video>, which no model here"),
    "video part": ({"messages": turns([{"type": "video"}, text("q")], "a")}, "video", "of type 'video'"),
    "video url": (
        {"messages": turns([{"type": "video_url"}, text("q")], "a")},
        "video",
        "of type 'video_url'",
    ),
    "audio": ({"audio": "a.wav", **TEXT}, "video", "the row has 'audio'"),
    "a typo": ({"messages": turns([{"type": "img"}], "a")}, "shape", "is neither .* but {'type': 'img'}"),
    "index beyond": (indexed(1), "image_count", "has the index 1"),
    "index of words": (indexed("0"), "image_count", "has the index '0'"),
    "index, not all": (indexed(0, None), "image_count", "has the index None"),
    "index unused": (indexed(0, images=("a.png", "b.png")), "image_count", r"images \[0\] of the row's 2"),
    "half a loss": (answered(weight=0.5), "shape", "has 'weight': 0.5: it is learnt whole"),
    "a loss in words": (answered(loss="false"), "shape", "'loss': 'false'"),
    "loss and weight differ": (answered(loss=True, weight=0), "shape", "learnt whole"),
    "a question to learn": (
        {"conversations": [{"from": "human", "value": "q", "loss": True}]},
        "shape",
        "only answers",
    ),
    "a row's weight": ({"weight": 2.5, **TEXT}, "shape", "the row has 'weight': 2.5"),
    "a row of no loss": ({"loss": False, **TEXT}, "no_label", "nothing of it is to be learnt"),
    "no answer's loss": (answered(loss=0), "no_label", "all have a loss or weight of 0"),
    "half a merged turn": (
        {"conversations": [*chat("q", "a"), {"from": "gpt", "value": "b", "loss": 0}]},
        "shape",
        "only one is to be learnt",
    ),
    "noncharacter": ({"conversations": chat("q", "a\ufdd0")}, "shape", r"\[1\].value' holds .*\(U\+FDD0\)"),
    "noncharacter in a part": ({"messages": turns([text("\ufdef")], "a")}, "shape", "noncharacters"),
    "lone surrogate in a path": ({"image": "x\ud800.png", "conversations": SEEN}, "image", "does not exist"),
    "another suffix": ({"image": "a.json", "conversations": SEEN}, "image", r"does not exist$"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_rows_are_good(write: WriteRows, name: str) -> None:
    source = write([GOOD[name]])
    assert check(source, encoder=VLDataset(source, tiny_processor())).ok
    item = VLDataset(source, tiny_processor(), strict=True)[0]
    found = 0 if item["pixel_values"] is None else len(item["pixel_values"])
    assert found == len(source[0].images)


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_that_row_alone(write: WriteRows, name: str) -> None:
    row, kind, reason = BAD[name]
    source = write([{"id": "x", **row}, *({"id": i, "conversations": chat("q", "a")} for i in range(11))])
    for encoder in (None, VLDataset(source, tiny_processor())):
        (problem,) = check(source, encoder=encoder).problems
        assert (problem.row, problem.id, problem.kind) == (0, "x", kind)
    with pytest.raises(RowError, match=reason) as caught:
        VLDataset(source, tiny_processor(), strict=True)[0]
    assert (caught.value.where, caught.value.id, caught.value.kind) == (
        f"{source.rows.path}:row 0",
        "x",
        kind,
    )
    loader = build_loader(
        VLDataset(source, tiny_processor()), PlanSettings(step_samples=12, micro_samples=12)
    )
    assert sum(step.num_samples for step in loader) == 12
    assert [r["kind"] for r in loader.bad_samples.records.values()] == [kind]


def test_pictures_are_in_the_order_of_their_index() -> None:
    parsed = parse_row(GOOD["index"])
    assert parsed.images == ("b.png", "a.png")
    assert parsed.messages[0]["content"] == [PICTURE, PICTURE, text("q")]
    assert parse_row(GOOD["one picture twice"]).images == ("a.png", "a.png")


# ---- what is learnt ----
@pytest.mark.parametrize("chat_name", ["vicuna_v1", "plain", "zephyr", "mamba"])
@pytest.mark.parametrize("key", ["loss", "weight"])
def test_an_answer_without_loss_is_read_and_not_learnt(write: WriteRows, chat_name: str, key: str) -> None:
    rows = [{"conversations": chat("what?", "one", "and?", "two", "so?", "three")} for _ in range(2)]
    rows[1]["conversations"][1][key] = 0
    data = VLDataset(write(rows), tiny_processor(chat=chat_name), strict=True)
    whole, part = data[0], data[1]
    assert whole["input_ids"].tolist() == part["input_ids"].tolist()
    decode = data.processor.tokenizer.decode
    learnt = [decode([i for i in item["labels"].tolist() if i >= 0]) for item in (whole, part)]
    assert "one" in learnt[0] and "one" not in learnt[1]
    assert learnt[1].count("three") == learnt[1].count("two") == 1


def test_a_template_without_a_block_for_each_answer_is_refused(write: WriteRows) -> None:
    row = {"id": 5, "conversations": chat("what?", "one", "and?", "two")}
    row["conversations"][1]["loss"] = False
    processor = tiny_processor()
    processor.chat_template = (
        "{% generation %}{% for m in messages %}{{ m.role }}{% endfor %}{% endgeneration %}"
    )
    source = write([row])
    with pytest.raises(
        RowError,
        match=r"row 0 \(id 5\): some answers have a loss of false, but the chat template writes 1 for 2",
    ) as caught:
        VLDataset(source, processor, strict=True)[0]
    assert caught.value.kind == "template"


# ---- whatever an encoder raises ----
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% generation %}{{ m.content[0].text }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)


def test_what_template_and_tokenizer_refuse_is_the_row(write: WriteRows, tmp_path: Path) -> None:
    processor = tiny_processor()
    processor.chat_template = TEMPLATE
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [f"<s{i}>" for i in range(40)]})
    rows: list[Any] = [{"id": i, "conversations": chat("q", "a")} for i in range(30)]
    rows[3]["conversations"].insert(0, {"from": "system", "value": "s"})
    rows[7]["conversations"][1]["value"] = "".join(f"<s{i}>" for i in range(40))
    data = VLDataset(write(rows), processor)
    report = check(data.mixture.sources[0], encoder=data)
    assert [(p.row, p.id, p.kind) for p in report.problems] == [(3, 3, "template"), (7, 7, "template")]
    assert (
        "no system" in report.problems[0].reason and "different special tokens" in report.problems[1].reason
    )
    listed = tmp_path / "bad.jsonl"
    table = compute_lengths(data, progress=False)
    loader = build_loader(
        data, PlanSettings(step_samples=10, micro_samples=5), lengths=table, bad_samples_path=listed
    )
    assert sum(step.num_samples for step in loader) == 28
    assert [json.loads(line)["id"] for line in listed.read_text().splitlines()] == [3, 7]


class Odd:
    """A source of a user's own, some of whose rows raise what they like."""

    name = "odd"

    def __init__(self, inner: LLaVASource, faults: dict[int, Exception]) -> None:
        self.inner, self.faults = inner, faults

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, row: int) -> Any:
        if row in self.faults:
            raise self.faults[row]
        return self.inner[row]


def test_a_source_may_raise_anything_but_settings(write: WriteRows) -> None:
    faults = {
        1: KeyError("x"),
        2: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
        3: DataError("gone"),
        4: RecursionError("deep"),
        5: OSError("unplugged"),
    }
    source = Odd(write([{"id": i, "conversations": chat("q", "a")} for i in range(60)]), faults)
    data = VLDataset(source, tiny_processor())
    assert [(p.row, p.where) for p in check(source).problems] == [(row, f"odd:row {row}") for row in faults]
    assert {data[row]["bad"][0]["index"] for row in faults} == set(faults)
    source.faults = {0: ConfigError("a setting")}
    for look in (lambda: data[0], lambda: check(source), lambda: compute_lengths(data, progress=False)):
        with pytest.raises(ConfigError, match="a setting"):
            look()


def test_an_image_processor_of_ones_own_may_raise(write: WriteRows) -> None:
    rows = [{"id": i, "image": "a.png", "conversations": chat("<image>q", "a")} for i in range(20)]
    processor = tiny_processor()
    processor.image_processor.process_one = lambda *_: 1 / 0
    with pytest.raises(RowError, match=r"row 0 \(id 0\): ZeroDivisionError"):
        VLDataset(write(rows), processor, strict=True)[0]


# ---- mutations ----
def mutated(row: Any, generator: np.random.Generator) -> Any:
    """A copy with one value somewhere replaced, removed, doubled or wrapped."""
    row = copy.deepcopy(row)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            collect(value[key])

    collect(row)
    if not places:
        return row
    holder, key = places[int(generator.integers(len(places)))]
    odd: list[Any] = [None, "", "gone.png", "a.png", "<image>", "<video>\n", "\ud800", "x\ufdd3", "y" * 400]
    odd += [3, 1.5, True, [], {}, "human", "gpt", "system", [holder[key]], {"type": "image"}]
    value = odd[int(generator.integers(len(odd)))]
    how = int(generator.integers(5))
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif how == 2 and isinstance(holder, dict):
        holder[str(generator.choice(["loss", "weight", "image", "images", "video", "index"]))] = value
    else:
        holder[key] = value
    return row


def test_check_and_training_agree_on_a_thousand_odd_rows(write: WriteRows) -> None:
    generator = np.random.default_rng(0)
    usual = {"id": 1, "image": "a.png", "conversations": chat("<image>q", "a", "r", "b")}
    seeds = [usual, *GOOD.values(), usual, *GOOD.values(), *(row for row, _, _ in BAD.values())]
    rows: list[Any] = []
    for number in range(1000):
        row: Any = seeds[number % len(seeds)]
        for _ in range(number % 3):
            row = mutated(row, generator)
        rows.append(row)
    data = VLDataset(write(rows), tiny_processor(num_image_tokens=2), max_length=120, strict=True)
    found = {problem.row: problem.kind for problem in check(data.mixture.sources[0], encoder=data).problems}
    shapes = {problem.row for problem in check(data.mixture.sources[0], decode=False).problems}
    table = compute_lengths(data, progress=False)
    bad = {}
    for row in range(len(rows)):
        try:
            item = data[row]
            assert (item["labels"][1:] != -100).any()
            assert table.lengths[row] == len(item["input_ids"])
        except RowError as error:
            bad[row] = error.kind
            assert error.where.endswith(f"rows.json:row {row}")
    assert found == bad
    assert 300 < len(bad) < 900
    assert {"shape", "image", "image_count", "video", "too_long", "no_label"} <= set(bad.values())
    assert shapes <= set(bad)
    unmeasured = set(np.flatnonzero(table.status != 0).tolist())
    assert unmeasured == {row for row, kind in bad.items() if kind != "image" or row in shapes}


# ---- files ----
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json.gz", gzip.compress(b"[]", mtime=0), "is compressed \\(gzip\\).*unpack it"),
        ("rows.jsonl", gzip.compress(b"{}", mtime=0), "is compressed \\(gzip\\)"),
        ("rows.json", b"PK\x03\x04...", "is compressed \\(zip\\)"),
        (
            "rows.json",
            b'[{"a": 1},]',
            "at row 1 .byte 10.: a comma stands before the end of the list. Take it out",
        ),
        ("rows.json", b'[{"a": 1}, \n ]', "a comma stands before the end"),
    ],
)
def test_files_that_cannot_be_read_say_why(
    tmp_path: Path, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        LLaVASource(tmp_path / name)
    assert main(["data", "check", str(tmp_path / name)]) == 2
    assert "cut off" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_an_empty_list_does_not_pass(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("[]" if name == "rows.json" else "\n")
    assert main(["data", "check", str(tmp_path / name)]) == 1
    assert "there are no rows" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [3, 1 << 22])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_deep_rows_and_long_numbers_are_errors_of_their_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr("vlmamba.data.index._CHUNK", chunk)
    good = json.dumps({"id": 1, "conversations": chat("q", 'a]}\\" [')})
    deep = '{"id": 2, "x": "]\\"[", "y": ' + "[" * 5000 + "]" * 5000 + "}"
    long = '{"id": 3, "n": ' + "9" * 5000 + "}"
    rows = [good, deep, long, "9" * 5000, good]
    (tmp_path / name).write_text("[" + " ,".join(rows) + "]" if name == "rows.json" else "\n".join(rows))
    source = LLaVASource(tmp_path / name)
    assert len(source) == 5
    assert source[0].messages == source[4].messages
    assert [p.row for p in check(source).problems] == [1, 2, 3]
    with pytest.raises(RowError, match="nested too deeply"):
        source[1]


def test_the_report_comes_whatever_names_hold(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "\ud800", "image": "x\udcff.png", "conversations": chat("<image>q", "a")},
        {"id": 1, "conversations": chat("\ud800", "a")},
    ]
    path = tmp_path / "rows\udcfe.json"
    path.write_text(json.dumps(rows))
    listed, clean = tmp_path / "list.jsonl", tmp_path / "clean.json"
    assert (
        main(
            [
                "data",
                "check",
                str(path),
                "--images",
                str(root),
                "--workers",
                "1",
                "--list",
                str(listed),
                "--clean",
                str(clean),
            ]
        )
        == 1
    )
    out = capsys.readouterr().out
    assert "2 rows, 0 images, 1 rows that cannot be used" in out and r"x\udcff.png" in out
    assert json.loads(listed.read_text())["row"] == 0
    assert len(json.loads(clean.read_text())) == 1


def test_the_command_looks_at_lengths_with_a_processor(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    rows = [
        {"id": 1, "conversations": chat("q", "a")},
        {"id": 2, "image": "a.png", "conversations": chat("<image>" + "w " * 99, "a")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["data", "check", str(tmp_path / "rows.json"), "--images", str(root), "--workers", "1"]
    assert main(words) == 0
    assert "that takes --processor RUN, or a recipe" in capsys.readouterr().out
    assert main([*words, "--processor", str(tmp_path / "export"), "--max-length", "200"]) == 1
    out = capsys.readouterr().out
    assert "1 too_long" in out and "that takes" not in out


# ---- tar shards ----
def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_samples_of_a_shard_that_are_not_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vlmamba.data.shards.MAX_BYTES", 4000)
    buffer = io.BytesIO()
    Image.effect_noise((9, 9), 90).save(buffer, "PNG")
    row = json.dumps({"conversations": chat("<image>q", "a")}).encode()
    members = [
        ("a.png", buffer.getvalue()), ("a.txt", b"one"), ("a.caption", b"two"),
        ("b.txt", b"a caption alone"),
        ("c.png", buffer.getvalue()), ("c.json", row), ("c.more.json", row),
        ("d.mp4", b"film"), ("d.txt", b"a film"),
        ("e.png", b"\0" * 5000), ("e.txt", b"too large"),
        ("f.png", buffer.getvalue()), ("f.txt", b"x" * 5000),
        ("g.png", buffer.getvalue()), ("g.txt", b"caf\xe9"),
        ("h\udcff.txt", b"alone"),
    ]  # fmt: skip
    path = shard(tmp_path / "s.tar", members)
    wanted = {
        "a": ("shape", "has 2 members that are its caption"),
        "b": ("image", "a caption and no picture"),
        "c": ("shape", "has 2 members that are its json"),
        "d": ("video", "has a video"),
        "e": ("image", "a member of 5000 bytes is larger than the 4000"),
        "f": ("shape", "a member of 5000 bytes"),
        "h\udcff": ("image", "a caption and no picture"),
    }
    source = ShardSource(path)
    report = check(source)
    assert {p.where.rpartition(":")[2]: (p.kind, p.reason) for p in report.problems}.keys() == wanted.keys()
    for problem in report.problems:
        kind, reason = wanted[problem.where.rpartition(":")[2]]
        assert problem.kind == kind and reason in problem.reason
    assert report.events["invalid_unicode"] == 1 and "\\udcff" in report.text()
    streamed = [r for r in ShardStream(path).read(0) if isinstance(r, RowError)]
    assert {error.where.rpartition(":")[2] for error in streamed} == wanted.keys() - {
        "e"
    }  # whose picture is not read yet
