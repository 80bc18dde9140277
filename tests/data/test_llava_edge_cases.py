"""Every row of the table of irregularities in real LLaVA files, from the file to the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import FakeProcessor, WriteRows, chat, text_of
from vlmamba.data import LLaVASource, RowError, VLDataset, build_loader, compute_lengths
from vlmamba.data.sampler import PlanSettings
from vlmamba.errors import DataError, MissingFileError
from vlmamba.testing import tiny_processor


@pytest.fixture
def load(write: WriteRows, processor: FakeProcessor) -> Any:
    """One row to an item of a strict data set."""

    def load(
        row: dict[str, Any], *, max_length: int = 200, image_position: str = "inline", **source: Any
    ) -> Any:
        data = VLDataset(
            write([row], **source),
            processor,
            max_length=max_length,
            image_position=image_position,
            strict=True,  # type: ignore[arg-type]
        )
        return data[0]

    return load


def test_no_image(load: Any) -> None:
    item = load({"id": 7, "model": "gpt-4", "conversations": chat("hi", "yo")})
    assert item["pixel_values"] is None
    assert text_of(item["input_ids"]) == "hiyo$"
    assert item["labels"].tolist()[:2] == [-100, -100]
    assert text_of(item["labels"][2:]) == "yo$"
    assert item["id"] == 7


def test_image_token_at_the_end_stays_there(load: Any) -> None:
    row = {"id": "x", "image": "a.png", "conversations": chat("Describe the photo.\n<image>", "A cat.")}
    assert text_of(load(row)["input_ids"]) == "Describe the photo.\n####A cat.$"
    assert text_of(load(row, image_position="front")["input_ids"]) == "####\nDescribe the photo.A cat.$"


def test_image_token_amid_a_sentence(load: Any) -> None:
    row = {"id": "x", "image": ["a.png", "b.png"], "conversations": chat("From <image> to <image>?", "Left.")}
    item = load(row)
    assert text_of(item["input_ids"]) == "From #### to ####?Left.$"
    assert item["pixel_values"].shape == (2, 3, 4, 4)
    assert item["pixel_values"][0, 0].max() < item["pixel_values"][1, 0].min()
    assert text_of(load(row, image_position="front")["input_ids"]) == "########\nFrom  to ?Left.$"


def test_several_image_tokens_for_one_image(load: Any) -> None:
    with pytest.raises(
        RowError, match=r"rows\.json:row 0 \(id 'x'\): 2 <image> in the questions but 1 under 'image'"
    ):
        load({"id": "x", "image": "a.png", "conversations": chat("<image>\n<image>\nwhat?", "it")})


def test_image_without_token_is_put_in_front(load: Any) -> None:
    item = load({"id": "x", "image": "a.png", "conversations": chat("what?", "it", "sure?", "yes")})
    assert text_of(item["input_ids"]) == "####\nwhat?it$sure?yes$"
    assert item["events"] == {"image_without_token": 1}


@pytest.mark.parametrize("row", [{}, {"image": None}, {"image": ""}, {"image": []}])
def test_token_without_image_is_rejected(load: Any, row: dict[str, Any]) -> None:
    with pytest.raises(
        RowError, match=r"'conversations\[0\]' has 1 <image> but the row has no 'image'"
    ) as caught:
        load({"id": "x", **row, "conversations": chat("<image>\nwhat?", "it")})
    assert caught.value.kind == "token_without_image"


def test_token_without_image_can_be_stripped_or_kept(load: Any) -> None:
    row = {"id": "x", "conversations": chat("<image>\nwhat?", "it", "and\n<image>\nnow?", "it")}
    item = load(row, orphan_tokens="strip")
    assert text_of(item["input_ids"]) == "what?it$and\nnow?it$"
    assert item["events"] == {"token_without_image": 2}
    item = load(row, orphan_tokens="literal")
    assert text_of(item["input_ids"]).startswith("<image>\nwhat?it$")
    assert item["events"] == {"escaped_literal_image": 2}


def test_first_turn_from_gpt_is_dropped(load: Any) -> None:
    turns = [{"from": "gpt", "value": "hello, I am"}, *chat("q", "a")]
    item = load({"id": "x", "conversations": turns})
    assert text_of(item["input_ids"]) == "qa$"
    assert item["events"] == {"leading_gpt_dropped": 1}


def test_first_turn_from_gpt_after_a_system_turn_is_dropped(load: Any) -> None:
    turns = [{"from": "system", "value": "S."}, {"from": "gpt", "value": "hello"}, *chat("q", "a")]
    assert text_of(load({"id": "x", "conversations": turns})["input_ids"]) == "S.qa$"


def test_odd_number_of_turns_drops_the_last_question(load: Any) -> None:
    item = load({"id": "x", "conversations": chat("q", "a", "and?")})
    assert text_of(item["input_ids"]) == "qa$"
    assert item["events"] == {"trailing_human_dropped": 1}


def test_dropped_last_question_takes_its_image_along(load: Any) -> None:
    item = load(
        {"id": "x", "image": ["a.png", "b.png"], "conversations": chat("<image>q", "a", "<image>and?")}
    )
    assert text_of(item["input_ids"]) == "####qa$"
    assert item["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_empty_answer_supervises_only_the_end(load: Any, answer: str) -> None:
    item = load({"id": "245723", "image": "a.png", "conversations": chat("<image>\nq", answer)})
    assert text_of(item["input_ids"]) == "####\nq$"
    assert [i for i in item["labels"].tolist() if i != -100] == [0]
    assert item["events"] == {"empty_answer": 1}


def test_answer_with_separators_is_whole(load: Any) -> None:
    answer = "Use </s> or USER: x ASSISTANT: y <|endoftext|>"
    item = load({"id": "x", "conversations": chat("q", answer)})
    assert text_of([i for i in item["labels"].tolist() if i != -100]) == answer + "$"


def test_longer_than_max_length_cuts_the_answer(load: Any) -> None:
    item = load({"id": "x", "image": "a.png", "conversations": chat("<image>\nq", "y" * 300)}, max_length=50)
    assert text_of(item["input_ids"]) == "####\nq" + "y" * 44
    assert item["labels"].tolist()[6:] == item["input_ids"].tolist()[6:]
    assert item["events"] == {"truncated": 1}


def test_longer_than_max_length_drops_a_question_without_answer(load: Any) -> None:
    item = load({"id": "x", "conversations": chat("q", "a", "z" * 100, "b")}, max_length=50)
    assert text_of(item["input_ids"]) == "qa$"


def test_longer_than_max_length_never_cuts_an_image(load: Any) -> None:
    turns = chat("<image>q", "y" * 20, "<image>r", "y" * 20, "<image>s", "y")
    item = load({"id": "x", "image": ["a.png", "b.png", "c.png"], "conversations": turns}, max_length=30)
    assert text_of(item["input_ids"]) == "####q" + "y" * 20 + "$"
    assert item["pixel_values"].shape[0] == 1
    assert item["events"] == {"turns_dropped": 2}
    item = load({"id": "x", "image": ["a.png", "b.png", "c.png"], "conversations": turns}, max_length=31)
    assert item["pixel_values"].shape[0] == 1, "the second image fits but no token of its answer does"
    item = load({"id": "x", "image": ["a.png", "b.png", "c.png"], "conversations": turns}, max_length=33)
    assert text_of(item["input_ids"]) == "####q" + "y" * 20 + "$####ryy"
    assert item["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("question", ["<image>" + "w" * 60, "<image>" * 20])
def test_longer_than_max_length_without_a_label_left_is_dropped(load: Any, question: str) -> None:
    images = ["a.png"] * question.count("<image>")
    with pytest.raises(RowError, match=r"no supervised token fits: .* max_length is 50") as caught:
        load({"id": "x", "image": images, "conversations": chat(question, "a")}, max_length=50)
    assert caught.value.kind == "too_long"


def test_length_is_known_before_batching(write: WriteRows, processor: FakeProcessor) -> None:
    rows = [
        {"id": 0, "image": "a.png", "conversations": chat("<image>q", "y" * 300)},
        {"id": 1, "conversations": chat("q" * 300, "y")},
        {"id": 2, "conversations": chat("q", "y")},
    ]
    data = VLDataset(write(rows), processor, max_length=50)
    table = compute_lengths(data, progress=False)
    assert table.values.tolist() == [[50, 1, 45, 0], [0, 0, 0, 2], [3, 0, 2, 0]]
    for row in (0, 2):
        assert len(data[row]["input_ids"]) == table.lengths[row]


def test_gif_named_jpg_is_found(load: Any, root: Path) -> None:
    (root / "ocr_vqa").mkdir()
    Image.effect_noise((5, 5), 99).convert("P").save(root / "ocr_vqa" / "0123.gif")
    item = load({"id": "x", "image": "ocr_vqa/0123.jpg", "conversations": chat("<image>q", "a")})
    assert item["pixel_values"].shape == (1, 3, 4, 4)
    assert item["events"] == {"image_suffix_replaced": 1}


def test_corrupt_image_is_replaced_and_counted(
    write: WriteRows, processor: FakeProcessor, root: Path
) -> None:
    (root / "bad.png").write_bytes((root / "a.png").read_bytes()[:40])
    rows = [{"id": i, "image": "a.png", "conversations": chat("<image>q", f"answer {i}")} for i in range(20)]
    rows[3]["image"] = "bad.png"
    data = VLDataset(write(rows), processor)
    item = data[3]
    assert item["index"] == 3
    assert item["used_index"] != 3
    assert text_of(item["input_ids"]) == f"####qanswer {item['used_index']}$"
    assert data[3]["used_index"] == item["used_index"], "the replacement is always the same"
    (record,) = item["bad"]
    assert record["id"] == 3
    assert record["where"].endswith("rows.json:row 3")
    assert "bad.png is cut off or not a picture (JPEG, PNG," in record["reason"]
    assert item["events"]["replaced"] == 1


def test_corrupt_images_over_the_budget_stop_the_run(write: WriteRows, processor: FakeProcessor) -> None:
    rows = [{"id": i, "image": "a.png", "conversations": chat("<image>q", "a")} for i in range(40)]
    for i in range(0, 40, 2):
        rows[i]["image"] = f"gone{i}.png"
    loader = build_loader(VLDataset(write(rows), processor), PlanSettings(step_samples=8, micro_samples=4))
    assert loader.bad_samples.allowed == 4
    with pytest.raises(
        DataError, match=r"of 40 rows cannot be used .*more than the 4 that max_bad_fraction=0.001"
    ):
        list(loader)


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [
        ("cmyk.jpg", "CMYK", (6, 6)),
        ("alpha.png", "RGBA", (6, 6)),
        ("strip.png", "RGB", (1, 9)),
        ("grey.png", "I;16", (6, 6)),
    ],
)
def test_unusual_pictures_are_converted(
    load: Any, root: Path, name: str, mode: str, size: tuple[int, int]
) -> None:
    Image.new(mode, size).save(root / name)
    assert load({"id": 1, "image": name, "conversations": chat("<image>q", "a")})["pixel_values"].shape == (
        1,
        3,
        4,
        4,
    )


def test_exif_rotation_is_off_unless_asked_for(write: WriteRows, root: Path) -> None:
    image = Image.fromarray(np.repeat(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8), 16, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(root / "turned.png", exif=exif)
    source = write([{"id": 1, "image": "turned.png", "conversations": chat("<image>q", "a")}])
    tiny = tiny_processor()
    as_stored = VLDataset(source, tiny)[0]["pixel_values"][0]
    tiny.image_processor.exif_transpose = True  # the one switch, saved with the checkpoint
    turned = VLDataset(source, tiny)[0]["pixel_values"][0]
    assert as_stored[0, 0, 0] > as_stored[0, -1, 0]
    assert turned[0, 0, 0] < turned[0, -1, 0]


@pytest.mark.parametrize("text", ["What does <image> mean in HTML?", "why is <image> slow", "see:<image>"])
def test_literal_image_token_in_a_text_only_chat_stays_text(load: Any, text: str) -> None:
    item = load({"id": "x", "conversations": chat(text, "The <image> tag.")})
    assert text_of(item["input_ids"]) == f"{text}The <image> tag.$"
    assert 1 not in item["input_ids"]
    assert item["events"] == {"escaped_literal_image": 2}


def test_literal_image_token_in_an_answer_stays_text(load: Any) -> None:
    item = load({"id": "x", "image": "a.png", "conversations": chat("<image>q", "write <image> here")})
    assert text_of(item["input_ids"]) == "####qwrite <image> here$"


def test_windows_path_is_read(load: Any, root: Path) -> None:
    (root / "coco" / "train2017").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(root / "coco" / "train2017" / "1.jpg")
    row = {"id": "x", "image": "coco\\train2017\\1.jpg", "conversations": chat("<image>q", "a")}
    assert load(row)["pixel_values"] is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd", r"'/etc/passwd' leaves its root: it means /etc/passwd, which is outside .*images"),
        ("C:\\data\\1.jpg", r"is an absolute Windows path; write it relative to the image root .*images"),
        ("\\\\host\\share\\1.jpg", "is an absolute Windows path"),
        ("https://example.org/1.jpg", "is an address; download the image"),
    ],
)
def test_absolute_paths_name_what_they_resolve_to(load: Any, name: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        load({"id": "x", "image": name, "conversations": chat("<image>q", "a")})


def test_missing_root_names_the_path_and_the_download(tmp_path: Path, write: WriteRows) -> None:
    write([{"id": 1, "conversations": chat("q", "a")}])
    with pytest.raises(MissingFileError) as caught:
        LLaVASource(tmp_path / "rows.json", tmp_path / "nope" / "LLaVA-Pretrain" / "images")
    assert f"the image root {tmp_path}/nope/LLaVA-Pretrain/images does not exist" in str(caught.value)
    assert f"the part that exists: {tmp_path}" in str(caught.value)
    assert "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain" in str(caught.value)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_ids_of_mixed_types_and_extra_keys(write: WriteRows, name: str) -> None:
    rows = [
        {"id": i, "model": "", "extra": {"a": [1]}, "conversations": chat("q", "a")}
        for i in (3, "000000033471", None)
    ]
    source = write(rows, name)
    assert [source[i].id for i in range(3)] == [3, "000000033471", None]
