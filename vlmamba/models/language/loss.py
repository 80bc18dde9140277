"""Next-token loss computed at supervised positions only.

Shapes: B batch, L length, D model width, n supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from vlmamba.common.vocabulary import IGNORE_INDEX
from vlmamba.errors import ShapeError
from vlmamba.ssm.checks import check_integers

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states (..., D) to logits (..., V): a module, or `families.language_logits` of a model."""


def supervised_positions(
    labels: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which positions predict a supervised next token.

    Position t predicts ``labels[:, t + 1]``. It does not count when that label is -100, when either of the
    two is padding, or when the two belong to different samples of a packed row (so packing changes no loss).

    Args:
        labels: (B, L), -100 where unsupervised.
        attention_mask: (B, L), 0 at padding.
        seq_idx: (B, L) sample index within a packed row.

    Returns:
        (B, L) bool; the last column is always False.
    """
    positions = torch.zeros_like(labels, dtype=torch.bool)
    predicts = labels[:, 1:] != IGNORE_INDEX
    if attention_mask is not None:
        mask = attention_mask[:, -labels.shape[1] :] != 0
        predicts = predicts & mask[:, 1:] & mask[:, :-1]
    if seq_idx is not None:
        predicts = predicts & (seq_idx[:, 1:] == seq_idx[:, :-1])
    positions[:, :-1] = predicts
    return positions


def next_token_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
    chunk_rows: int = 4096,
) -> torch.Tensor:
    """Cross entropy of the next token, through the head at supervised rows only.

    The rows are selected before the head, so no logits are computed where no label is. Many rows go through
    the head in chunks that are recomputed in backward, so at most `chunk_rows` rows of logits exist at a
    time.

    Args:
        hidden: (B, L, D) last hidden states.
        head: Maps (n, D) to (n, V).
        labels: (B, L), -100 where unsupervised; shifted here, not by the caller.
        attention_mask: (B, L), 0 at padding.
        seq_idx: (B, L) sample index within a packed row.
        num_items: Divides the summed loss; the number of supervised positions when not given.
        chunk_rows: Rows per chunk.

    Returns:
        A scalar; 0 (with a gradient path) when nothing is supervised.

    Raises:
        ShapeError: Labels and hidden states have different lengths.
    """
    if labels.shape != hidden.shape[:2]:
        raise ShapeError(
            f"labels have shape {tuple(labels.shape)} but hidden states {tuple(hidden.shape[:2])}"
        )
    positions = supervised_positions(labels, attention_mask=attention_mask, seq_idx=seq_idx)
    rows = hidden[positions]
    targets = labels[:, 1:][positions[:, :-1]]
    total = summed_loss(rows, targets, head, chunk_rows=chunk_rows)
    return total / (max(rows.shape[0], 1) if num_items is None else num_items)


def summed_loss(
    rows: torch.Tensor, targets: torch.Tensor, head: Head, *, chunk_rows: int = 4096
) -> torch.Tensor:
    """Sum of the cross entropies of (n, D) hidden states; see `next_token_loss`."""
    if rows.shape[0] <= chunk_rows:
        return _summed(rows, targets, head)
    parts = zip(rows.split(chunk_rows), targets.split(chunk_rows), strict=True)
    return torch.stack([_checkpointed(part, wanted, head) for part, wanted in parts]).sum()


def loss_from_logits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    num_items: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """As `next_token_loss`, from logits (B, L, V) that exist already."""
    return next_token_loss(
        logits,
        lambda rows: rows,
        labels,
        attention_mask=attention_mask,
        seq_idx=seq_idx,
        num_items=num_items,
        chunk_rows=max(labels.numel(), 1),
    )


def _summed(rows: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    logits = apply_head(head, rows)
    check_integers("the loss", "labels", targets, limit=logits.shape[-1])
    return F.cross_entropy(logits, targets, reduction="sum")


def _checkpointed(rows: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    summed: torch.Tensor = torch.utils.checkpoint.checkpoint(
        _summed, rows, targets, head, use_reentrant=False
    )
    return summed


def apply_head(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, whatever the dtypes of the hidden states and of the head."""
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor):
        hidden = hidden.to(weight.dtype)
    logits: torch.Tensor = head(hidden).float()
    return logits


def select_rows(
    hidden: torch.Tensor, logits_to_keep: int | torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The hidden states whose logits are wanted.

    Args:
        hidden: (B, L, D).
        logits_to_keep: 0 for all; n for the last n; positions, (k) for all rows or (B, k), for (B, k, D); a
            bool mask (B, L) for (n, D), row by row.
        attention_mask: (B, >= L). With it, ``logits_to_keep=1`` means each row's last real token rather than
            the last column, so that `generate` continues right-padded rows as it does left-padded ones.

    Raises:
        ShapeError: A number below 0, a bool mask of another shape, or positions that there are not.
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ShapeError(
                f"logits_to_keep is {logits_to_keep}; give 0 for all, or how many last positions"
            )
        if logits_to_keep == 1 and attention_mask is not None:
            length = hidden.shape[1]
            columns = torch.arange(length, device=hidden.device)
            last = ((attention_mask[:, -length:] != 0) * columns).amax(dim=1, keepdim=True)
            return _gather_rows(hidden, last)
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    if logits_to_keep.dtype == torch.bool:
        if logits_to_keep.shape != hidden.shape[:2]:
            raise ShapeError(
                f"logits_to_keep is a mask of shape {tuple(logits_to_keep.shape)} but the input is "
                f"{tuple(hidden.shape[:2])} (batch, length)"
            )
        return hidden[logits_to_keep]
    check_integers("logits_to_keep", "the tensor", logits_to_keep, limit=hidden.shape[1])
    if logits_to_keep.dim() not in (1, 2) or (
        logits_to_keep.dim() == 2 and logits_to_keep.shape[0] != hidden.shape[0]
    ):
        raise ShapeError(
            f"logits_to_keep has shape {tuple(logits_to_keep.shape)} but the input has {hidden.shape[0]} rows; give "
            f"positions (k) for all rows, or ({hidden.shape[0]}, k)"
        )
    if logits_to_keep.dim() == 2:
        return _gather_rows(hidden, logits_to_keep)
    return hidden[:, logits_to_keep]


def _gather_rows(hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
