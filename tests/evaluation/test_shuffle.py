from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlmamba.errors import DataError
from vlmamba.evaluation import Sample
from vlmamba.evaluation.shuffle import shuffle_images


def questions(sets: list[str]) -> list[Sample]:
    """One question for each word; its letters are the pictures."""
    return [Sample(i, tuple(Path(letter) for letter in word), f"q{i}") for i, word in enumerate(sets)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sets",
    [
        ["a", "b"],
        list("aaabbb"),
        list("aaaaabbbcd"),
        ["a", "b", "c", "ab", "cd", "ef", "", ""],
        ["ab", "ac", "ad", "ef", "eg", "eh"],
        ["ab", "cd", "ba", "dc"],
        [letter * 1 for letter in "abcdefghij" for _ in range(7)],
    ],
)
def test_nobody_keeps_a_picture_of_their_own(sets, seed):
    before = questions(sets)
    after = shuffle_images(before, seed=seed)
    assert [s.key for s in after] == [s.key for s in before]
    for old, new in zip(before, after, strict=True):
        assert len(old.images) == len(new.images)
        assert not set(old.images) & set(new.images)
        if old.images:
            assert new.images == before[new.metadata["images_from"]].images
    assert Counter(s.images for s in before) == Counter(s.images for s in after)


def test_it_is_a_function_of_the_seed():
    sets = list("abcdefghij")
    first, again, other = (shuffle_images(questions(sets), seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_pictures_in_memory_are_told_apart_by_content():
    def picture(value):
        return Image.new("RGB", (2, 2), (value, 0, 0))

    samples = [Sample(i, (picture(i // 2),), str(i)) for i in range(4)]
    for old, new in zip(samples, shuffle_images(samples), strict=True):
        assert old.images[0].tobytes() != new.images[0].tobytes()
    assert shuffle_images([Sample(0, (b"x",), ""), Sample(1, (b"y",), "")])[0].images == (b"y",)


def test_what_cannot_be_shuffled():
    with pytest.raises(DataError, match="no question has a picture"):
        shuffle_images(questions(["", ""]))
    with pytest.raises(
        DataError, match=r"the pictures of the 3 question\(s\) with 1 picture\(s\) cannot be dealt out"
    ):
        shuffle_images(questions(list("aab")))
