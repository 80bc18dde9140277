"""Packed rows as transformers writes them: positions that start anew.

Shapes: B rows, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.errors import ShapeError
from vlmamba.models.language.attention import padded_position_ids


def samples_of_rows(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    cache: Any,
    shape: tuple[int, int],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The samples (`seq_idx`) that rows are packed from, in whichever words they were told.

    Args:
        position_ids: (B, L), or (1, L) for all rows.
        attention_mask: (B, L); then positions must be those of its real tokens.
        seq_idx: Given ones, which say it already.
        cache: With one, positions go on and are not looked at.
        shape: (B, L) of the input.
        kwargs: Further arguments; FlashAttention's words (`FLASH_NAMES`) are taken out of them.

    Returns:
        `seq_idx` (B, L), or None where every row is one sample.

    Raises:
        ShapeError: The words do not fit together.
    """
    samples = _of_positions(position_ids, attention_mask, seq_idx, cache, shape)
    _check_boundaries(kwargs, samples, *shape)
    return samples


def _of_positions(
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    cache: Any,
    shape: tuple[int, int],
) -> Tensor | None:
    """The samples that positions tell of, if they are neither those of whole rows nor of packed samples an error."""
    if position_ids is None or cache is not None:
        return seq_idx
    if position_ids.shape not in (shape, (1, shape[1])):
        raise ShapeError(
            f"position_ids have shape {tuple(position_ids.shape)} but the input is {shape}; give them that shape, or "
            f"{(1, shape[1])} for all rows"
        )
    position_ids = position_ids.expand(shape)
    first = torch.zeros_like(position_ids[:, :1], dtype=torch.bool)
    starts = torch.cat([first, position_ids[:, 1:] != position_ids[:, :-1] + 1], dim=1)
    if seq_idx is None and attention_mask is None:
        if bool((position_ids[starts] != 0).any()) or bool((position_ids[:, 0] != 0).any()):
            raise ShapeError(
                "position_ids must count from 0 in every sample; vlmamba's positions follow from the mask, seq_idx or "
                "the cache, and cannot be set otherwise"
            )
        return starts.cumsum(dim=1).to(torch.int32) if bool(starts.any()) else None
    if seq_idx is not None:
        changes = torch.cat([first, seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1)
        fits = torch.equal(changes, starts)
    else:
        assert attention_mask is not None
        wanted = padded_position_ids(attention_mask, position_ids.shape[1])
        real = attention_mask[:, -position_ids.shape[1] :] != 0
        fits = bool(((position_ids == wanted) | ~real).all())
    if not fits:
        raise ShapeError(
            f"position_ids do not fit {'seq_idx' if seq_idx is not None else 'attention_mask'}: positions follow from "
            "it here, so leave position_ids out"
        )
    return seq_idx


FLASH_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""FlashAttention's words for packed rows, which trainers without padding pass along with positions."""


def _check_boundaries(kwargs: dict[str, Any], seq_idx: Tensor | None, rows: int, length: int) -> None:
    """Take FlashAttention's words (`FLASH_NAMES`) out of keyword arguments; they must say what `seq_idx` says."""
    given = {name: value for name in FLASH_NAMES if (value := kwargs.pop(name, None)) is not None}
    bounds = [value for name, value in given.items() if isinstance(value, Tensor) and value.dim() == 1]
    if not bounds:
        return
    starts = torch.zeros(rows, length, dtype=torch.bool, device=bounds[0].device)
    starts[:, :1] = True
    if seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    end = torch.tensor([rows * length], device=starts.device)
    wanted = torch.cat([starts.flatten().nonzero().flatten(), end])
    if not all(torch.equal(value.to(wanted), wanted) for value in bounds):
        raise ShapeError(
            f"{', '.join(given)} tell of other samples than position_ids and seq_idx do; give seq_idx, or position_ids "
            "that start anew, and leave them out"
        )
