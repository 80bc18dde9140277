"""The recurrent state of a model."""

from __future__ import annotations

import pytest
import torch

from vlmamba.ssm.state import MambaState


@pytest.fixture
def state():
    found = MambaState.allocate(2, 3, intermediate_size=5, state_size=4, conv_kernel=4, dtype=torch.bfloat16)
    for number, layer in enumerate(found):
        layer.conv.copy_(torch.arange(3).view(3, 1, 1) + 10 * number)
        layer.ssm.copy_(torch.arange(3).view(3, 1, 1) + 10 * number)
    found.seen_tokens = 7
    return found


def _rows(state, layer=0):
    assert torch.equal(state[layer].conv[:, 0, 0].float(), state[layer].ssm[:, 0, 0])
    return state[layer].ssm[:, 0, 0].tolist()


def test_allocate_gives_zeros_in_the_right_dtypes():
    state = MambaState.allocate(2, 3, 5, 4, 4, torch.bfloat16, "cpu")
    assert len(state) == 2
    assert state.batch_size == 3
    assert state.seen_tokens == 0
    assert state[1].conv.shape == (3, 3, 5)
    assert state[1].conv.dtype == torch.bfloat16
    assert state[1].ssm.shape == (3, 5, 4)
    assert state[1].ssm.dtype == torch.float32
    assert not state[1].ssm.any()


def test_select_copies_rows(state):
    chosen = state.select(torch.tensor([2, 0]))
    assert _rows(chosen) == [2, 0]
    assert _rows(chosen, 1) == [12, 10]
    assert chosen.seen_tokens == 7
    chosen[0].ssm.zero_()
    assert _rows(state) == [0, 1, 2]


def test_reorder_keeps_the_tensors_in_place(state):
    before = state[0].ssm.data_ptr()
    state.reorder(torch.tensor([1, 1, 0]))
    assert _rows(state) == [1, 1, 0]
    assert state[0].ssm.data_ptr() == before
    state.reorder(torch.tensor([2, 0]))
    assert _rows(state) == [0, 1]
    assert state.batch_size == 2


def test_repeat_interleave_reset_and_clone(state):
    state.repeat_interleave(2)
    assert _rows(state) == [0, 0, 1, 1, 2, 2]
    copy = state.clone()
    state.reset()
    assert _rows(state) == [0] * 6
    assert state.seen_tokens == 0
    assert _rows(copy, 1) == [10, 10, 11, 11, 12, 12]
    assert copy.seen_tokens == 7
