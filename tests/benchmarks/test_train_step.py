"""benchmarks/train_step.py: vlmamba and transformers' LLaVA take the same step, or nothing is timed."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close


@pytest.fixture(scope="module")
def train_step(load):
    return load("train_step")


@pytest.fixture
def pair(train_step):
    ours = train_step.our_model(train_step.SIZES["tiny"])
    return ours, train_step.their_model(ours)


def test_both_take_the_same_step(train_step, pair):
    ours, theirs = pair
    batch = train_step.make_batch(ours, (3, 6, 9))
    assert train_step.compare("case", ours, theirs, batch) < 1e-4
    losses = [[float(train_step.stepper(model, batch)()) for _ in range(1)] for model in pair]
    assert_close(*losses, atol=1e-3, rtol=1e-3)


def test_the_tower_is_frozen_and_the_rest_trains(train_step, pair):
    ours, theirs = pair
    trained = {train_step.their_name(n) for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name for name in trained)


def test_batches_are_ragged_and_supervised(train_step, pair):
    batch = train_step.make_batch(pair[0], (3, 6, 9))
    visual = pair[0].multi_modal_projector.num_tokens
    assert batch["attention_mask"].sum(1).tolist() == [visual + n for n in (3, 6, 9)]
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 1, 1]
    assert ((batch["input_ids"] == pair[0].config.image_token_id).sum(1) == visual).all()


def test_a_difference_stops_the_case(train_step, pair, common):
    ours, theirs = pair
    with torch.no_grad():
        theirs.model.language_model.layers[0].mixer.D.add_(0.1)
    with pytest.raises(
        common.DisagreementError, match="case: transformers LLaVA does not compute the same thing"
    ):
        train_step.compare("case", ours, theirs, train_step.make_batch(ours, (3, 6)))


def test_the_linear_loop_is_undone(train_step):
    from transformers.models.mamba import modeling_mamba

    before = modeling_mamba.mamba_selective_scan
    with train_step.linear_loop():
        assert modeling_mamba.mamba_selective_scan is not before
    assert modeling_mamba.mamba_selective_scan is before


def test_the_program(train_step, tmp_path, capsys):
    assert train_step.main(["tiny", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "train_step.json").read_text())["cases"]
    assert case["timings"].keys() == {train_step.OURS, train_step.THEIRS, train_step.LINEAR}
    assert "quadratic in the length" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train_step.main(["130M"])
    assert "unknown size '130M'; there are playground, 130m, tiny" in capsys.readouterr().err
