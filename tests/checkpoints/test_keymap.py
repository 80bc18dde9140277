from __future__ import annotations

import pytest

from vlmamba.checkpoints.keymap import KeyMap, Rule, add_prefix, part_of
from vlmamba.errors import CheckpointError

MAP = KeyMap(
    "the test layout",
    (
        Rule("blocks.{i}.attn.{rest}", "layers.{i}.attention.{rest}"),
        Rule("swap.{a}.{b}", "{b}/{a}"),
        Rule("head.weight", "out.weight"),
    ),
    ignored=("{any}.inv_freq",),
)


def test_both_ways():
    theirs = {"blocks.11.attn.q.weight": 1, "swap.3.4": 2, "head.weight": 3}
    ours = {"layers.11.attention.q.weight": 1, "4/3": 2, "out.weight": 3}
    assert MAP.to_ours(theirs) == ours
    assert MAP.to_theirs(ours) == theirs


def test_ignored_names_are_dropped():
    assert MAP.to_ours({"rope.inv_freq": 1, "head.weight": 2}) == {"out.weight": 2}
    assert MAP.fits({"rope.inv_freq": 1, "head.weight": 2})
    assert not MAP.fits({"head.weight": 2, "other": 1})
    assert not MAP.fits({})


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
    double = KeyMap("double", (Rule("a.{x1}", "c.{x1}"), Rule("b.{x1}", "c.{x1}")))
    with pytest.raises(CheckpointError, match=r"a.w and b.w both become c.w \(double\)"):
        double.to_ours({"a.w": 1, "b.w": 2})


def test_rules_with_unequal_fields_are_programming_errors():
    with pytest.raises(ValueError, match="both sides must have the same fields"):
        Rule("a.{i}", "b.{j}")


def test_prefixes():
    state = {"w": 1, "x.w": 2}
    assert add_prefix(state, "p.") == {"p.w": 1, "p.x.w": 2}
    assert part_of({"q.w": 0} | add_prefix(state, "p."), "p.") == state
