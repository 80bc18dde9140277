"""The playground's data: deterministic, true, balanced, in LLaVA's layout, and held out where it says so."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def questions_of(root: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (root / "heldout/questions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def heldout_scene(scenes, value: dict):
    background = {k: tuple(v) if isinstance(v, list) else v for k, v in value["background"].items()}
    digits = tuple(scenes.Digit(**{**digit, "rgb": tuple(digit["rgb"])}) for digit in value["digits"])
    return scenes.Scene(scenes.Background(**background), digits)


def test_same_seed_gives_identical_bytes_and_another_seed_does_not(
    make_data, options, dataset, tmp_path
) -> None:
    make_data.make_data(options, tmp_path / "again", quiet=True)
    assert files(tmp_path / "again") == files(dataset)
    make_data.make_data(dataclasses.replace(options, seed=4), tmp_path / "other", quiet=True)
    assert (tmp_path / "other/pretrain/captions.json").read_bytes() != (
        dataset / "pretrain/captions.json"
    ).read_bytes()


def test_existing_data_is_reused_and_replaced_only_if_the_options_differ(
    make_data, options, tmp_path
) -> None:
    small = dataclasses.replace(options, captions=2, conversations=2)
    make_data.make_data(small, tmp_path / "d", quiet=True)
    mark = tmp_path / "d/pretrain/images/mark"
    mark.touch()
    make_data.make_data(small, tmp_path / "d", quiet=True)
    assert mark.exists()
    make_data.make_data(dataclasses.replace(small, captions=3), tmp_path / "d", quiet=True)
    assert not mark.exists()
    assert len(read(tmp_path / "d/pretrain/captions.json")) == 3


def test_a_directory_of_somebody_else_is_never_emptied(make_data, options, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(FileExistsError, match="holds no playground data; choose another --out"):
        make_data.make_data(options, tmp_path, quiet=True)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_too_many_questions_about_too_few_scenes_is_an_error_not_an_endless_loop(
    make_data, options, tmp_path
) -> None:
    greedy = dataclasses.replace(
        options, captions=1, conversations=1, heldout_scenes=2, heldout_questions=5000
    )
    with pytest.raises(
        ValueError, match=r"5000 different held-out questions about 2 scenes .*raise --heldout-scenes"
    ):
        make_data.make_data(greedy, tmp_path / "d", quiet=True)


def test_digit_samples_are_split_once_stratified_and_disjoint(scenes) -> None:
    train, held_out = scenes.digit_pools()
    assert len(train) == 1400
    assert len(held_out) == 397
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(range(1797))
    shares = Counter(scenes.label_of(i) for i in held_out)
    assert min(shares.values()) >= 39
    assert max(shares.values()) <= 40


def test_heldout_pictures_use_heldout_samples_only(dataset, scenes) -> None:
    train, held_out = scenes.digit_pools()
    used = {d["sample"] for scene in read(dataset / "heldout/scenes.json").values() for d in scene["digits"]}
    assert used <= set(held_out)
    recorded = read(dataset / "metadata.json")["digit_samples"]
    assert recorded["shared"] == 0
    assert set(recorded["heldout_indices"]) == set(held_out)
    assert not set(recorded["heldout_indices"]) & set(train)


def test_stage_one_rows_are_llavas(dataset, options) -> None:
    rows = read(dataset / "pretrain/captions.json")
    assert len(rows) == options.captions
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "image", "conversations"}
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1
        assert human["value"].startswith("<image>\n") or human["value"].endswith("\n<image>")
        with Image.open(dataset / "pretrain/images" / row["image"]) as picture:
            assert (picture.size, picture.mode, picture.format) == ((96, 96), "RGB", "JPEG")


def test_stage_two_rows_have_turns_text_only_rows_and_pairs(dataset, options) -> None:
    rows = read(dataset / "finetune/conversations.json")
    assert len(rows) == options.conversations
    kinds = Counter(type(row.get("image")).__name__ for row in rows)
    assert kinds["NoneType"] >= 1
    assert kinds["list"] >= 1
    for row in rows:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        images = row.get("image", [])
        images = [images] if isinstance(images, str) else images
        assert turns[0]["value"].count("<image>") == len(images)
        assert not any("<image>" in turn["value"] for turn in turns[1:])
        assert all(turn["value"] for turn in turns)
        assert all((dataset / "finetune/images" / name).is_file() for name in images)
    assert sum(len(row["conversations"]) // 2 for row in rows) / len(rows) > 3


def test_heldout_answers_are_true(dataset, scenes, phrases, options) -> None:
    truth = {n: heldout_scene(scenes, s) for n, s in read(dataset / "heldout/scenes.json").items()}
    questions = questions_of(dataset)
    assert len(questions) == options.heldout_questions
    assert [q["question_id"] for q in questions] == list(range(len(questions)))
    for question in questions:
        names = question["image"] if isinstance(question["image"], list) else [question["image"]]
        facts = [truth[name] for name in names]
        assert phrases.answer_from_scene(question["kind"], question["slots"], facts) == question["answer"]
        assert question["category"] in phrases.CATEGORIES
        assert all(value in question["text"] for value in question["slots"].values())


def test_pictures_on_disk_show_the_scenes_they_claim(dataset, scenes) -> None:
    for name, value in read(dataset / "heldout/scenes.json").items():
        scene = heldout_scene(scenes, value)
        with Image.open(dataset / "heldout/images" / name) as picture:
            difference = np.abs(np.asarray(picture, np.int32) - scenes.render(scene).astype(np.int32))
        assert difference.mean() < 5  # what JPEG at quality 95 changes, noise backgrounds included
        for digit in scene.digits:
            assert scenes.label_of(digit.sample) == digit.value


def test_yes_and_no_and_first_and_second_are_balanced(make_data, options, scenes) -> None:
    more = dataclasses.replace(options, heldout_scenes=60, heldout_questions=300)
    rows = make_data.heldout_questions(more, make_data.heldout_scenes(more))
    answers = Counter((question.category, question.answer) for _, question in rows)
    assert abs(answers["exists", "yes"] - answers["exists", "no"]) <= 1
    assert abs(answers["compare", "first"] - answers["compare", "second"]) <= 1
    counts = [answers["count", number] for number in ("one", "two", "three", "four")]
    assert max(counts) <= 0.5 * sum(counts)
    shares = Counter(question.category for _, question in rows)
    assert all(abs(shares[name] - share * 300) < 3 for name, share in make_data.HELDOUT_SHARES.items())


def test_answering_without_looking_scores_at_most_45_percent(dataset) -> None:
    blind = read(dataset / "metadata.json")["blind_baseline"]
    assert blind["by_category"]["overall"] <= 0.45
    assert blind["by_question"]["overall"] <= 0.45


def test_blind_baseline_uses_training_answers(make_data, phrases) -> None:
    def question(text: str, answer: str):
        return phrases.Question("count", "count", text, answer, {})

    asked = [question("a?", "one"), question("a?", "one"), question("b?", "two"), question("b?", "two")]
    asked.append(question("c?", "one"))
    heldout = [
        question("a?", "one"),
        question("b?", "two"),
        question("unseen?", "one"),
        question("b?", "one"),
    ]
    result = make_data.blind_baseline(asked, heldout)
    assert result["by_category"] == {"overall": 0.75, "count": 0.75}
    assert result["by_question"] == {"overall": 0.75, "count": 0.75}


def test_ambiguous_questions_are_refused(phrases, scenes) -> None:
    rng = np.random.default_rng(0)
    pool, _ = scenes.digit_pools()
    scene = scenes.sample_scene(rng, pool, num_digits=2)
    twins = dataclasses.replace(
        scene, digits=tuple(dataclasses.replace(d, value=7, colour="red") for d in scene.digits)
    )
    with pytest.raises(ValueError, match="2 digits match, expected exactly one"):
        phrases.answer_from_scene("colour_of", {"value": "7"}, [twins])
    assert phrases.answer_from_scene("count", {}, [twins]) == "two"
    with pytest.raises(ValueError, match="no single image is meant"):
        phrases.answer_from_scene("which_value", {"value": "7"}, [twins, twins])


def test_captions_name_every_digit_with_colour_and_place(phrases, scenes) -> None:
    rng = np.random.default_rng(5)
    pool, _ = scenes.digit_pools()
    for _ in range(60):
        scene = scenes.sample_scene(rng, pool)
        text = phrases.caption(scene, rng)
        assert text[-1] == "."
        for digit in scene.digits:
            assert f"{digit.colour} {digit.value}" in text
            assert digit.place in text.lower()


def test_scenes_are_legible(scenes) -> None:
    """Every digit stands out from what is behind it and lies inside the picture."""
    rng = np.random.default_rng(6)
    pool, _ = scenes.digit_pools()
    for _ in range(40):
        scene = scenes.sample_scene(rng, pool)
        picture, ink = scenes.draw(scene)
        empty = (scenes.draw_background(scene.background) * 255).clip(0, 255)
        for digit in scene.digits:
            column, row = scenes.CELL * (digit.cell % 2), scenes.CELL * (digit.cell // 2)
            cell = np.s_[row : row + scenes.CELL, column : column + scenes.CELL]
            stroke = ink[cell] > 0.9
            assert 0.02 < stroke.mean() < 0.5
            distance = np.linalg.norm(picture[cell][stroke] - empty[cell][stroke], axis=-1)
            assert np.median(distance) > 80
