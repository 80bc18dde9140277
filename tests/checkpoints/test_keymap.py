from __future__ import annotations

import pytest

from vlmamba.checkpoints.layouts import KeyMap, part_of
from vlmamba.errors import CheckpointError

MAP = KeyMap(
    "the test layout",
    [
        ("blocks.{i}.attn.{rest}", "layers.{i}.attention.{rest}"),
        ("swap.{a}.{b}", "{b}/{a}"),
        ("head.weight", "out.weight"),
    ],
)


def test_both_ways():
    theirs = {"blocks.11.attn.q.weight": 1, "swap.3.4": 2, "head.weight": 3}
    ours = {"layers.11.attention.q.weight": 1, "4/3": 2, "out.weight": 3}
    assert MAP.to_ours(theirs) == ours
    assert MAP.to_theirs(ours) == theirs


def test_numbers_are_numbers_and_dots_are_dots():
    for name in ("blocks.x.attn.q", "blocks.1.attn.", "headXweight"):
        with pytest.raises(CheckpointError, match="1 names are not known in the test layout"):
            MAP.to_ours({name: 0})


def test_unknown_names_are_listed_with_the_known_patterns():
    with pytest.raises(CheckpointError) as caught:
        MAP.to_ours(dict.fromkeys((f"n{i}" for i in range(10)), 0), where="file.bin")
    text = str(caught.value)
    assert text.startswith("file.bin: 10 names are not known in the test layout: n0, n1")
    assert "and 2 more" in text
    assert "blocks.{i}.attn.{rest}" in text
    with pytest.raises(CheckpointError, match=r"Known are: layers"):
        MAP.to_theirs({"head.weight": 0})


def test_two_names_must_not_become_one():
    double = KeyMap("double", [("a.{x1}", "c.{x1}"), ("b.{x1}", "c.{x1}")])
    with pytest.raises(CheckpointError, match=r"a.w and b.w both become c.w \(double\)"):
        double.to_ours({"a.w": 1, "b.w": 2})


def test_rules_with_unequal_fields_are_programming_errors():
    with pytest.raises(ValueError, match="both sides must have the same fields"):
        KeyMap("wrong", [("a.{i}", "b.{j}")])


def test_prefixes():
    assert part_of({"q.w": 0, "p.w": 1, "p.x.w": 2}, "p.") == {"w": 1, "x.w": 2}
