"""The laws of a language model, tried on one: packed, padded, split, stepped, reloaded, it is the same model.

What a family refuses is asked for, too, and must raise. `vlmamba check language` prints the table; docs/backbones.md is
that table for all families.

Shapes: B batch, L length, D model width, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmamba.errors import ConfigError
from vlmamba.models.language.attention import window_of
from vlmamba.models.language.families import (
    Verdict,
    family_of,
    language_logits,
    load_language_model,
    run_language_model,
)

LONGEST_WINDOW = 256
"""Rows are longer than an attention window up to this; a longer one is not reached."""

BOUND = 5e-5
"""Largest relative error that is rounding: fp32 leaves 1e-7 to 5e-6."""

GRADIENT_FLOOR = 1e-2
"""A parameter's gradient is held against this share of the largest one, if it is smaller."""

NAMES = (
    "causal",
    "logits",
    "packed",
    "padded left",
    "padded right",
    "stepped",
    "split",
    "continued",
    "reloaded",
)

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Law:
    """What became of one law.

    Attributes:
        name: "packed", "padded", ...
        verdict: "exact", "refused" or "wrong".
        error: Largest relative error of values and gradients; None where nothing was compared.
        detail: The reason of a refusal, or what was wrong.
    """

    name: str
    verdict: str
    error: float | None = None
    detail: str = ""


def check_laws(model: Any) -> list[Law]:
    """Try every law on a language model.

    Args:
        model: From `build_language_model` or `load_language_model`, in float32; it is put into evaluation mode, and its
            parameters' gradients are cleared.

    Returns:
        The laws in a fixed order.
    """
    model.eval()
    family = family_of(model)
    rows = _rows(model)
    tried: tuple[tuple[Verdict, Callable[[], float]], ...] = (
        (True, partial(_causal, model, rows)),
        (True, partial(_own_logits, model, rows)),
        (family.packs, partial(_packed, model, rows)),
        (family.pads, partial(_padded, model, rows, left=True)),
        (family.pads, partial(_padded, model, rows, left=False)),
        (True, partial(_stepped, model, rows)),
        (True, partial(_split, model, rows)),
        (family.continues, partial(_continued, model, rows)),
        (True, partial(_reloaded, model, rows)),
    )
    with _quiet_gradients(model):
        return [_judge(name, *law) for name, law in zip(NAMES, tried, strict=True)]


def refused(reason: str) -> list[Law]:
    """What `check_laws` would return of a model that is refused where it is built."""
    return [Law(name, "refused", None, reason) for name in NAMES]


def table(results: Sequence[tuple[str, Sequence[Law]]]) -> str:
    """A Markdown table, a row a model."""
    lines = ["| Language model | " + " | ".join(NAMES) + " |", "|---" * (len(NAMES) + 1) + "|"]
    for model, laws in results:
        cells = [
            law.verdict
            if law.error is None
            else f"{law.verdict} ({law.error:.0e})"
            if law.error
            else law.verdict
            for law in laws
        ]
        lines.append(f"| `{model}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons(results: Sequence[tuple[str, Sequence[Law]]]) -> str:
    """Why something is refused, or what is wrong, each once."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for model, laws in results:
        for law in laws:
            if law.detail:
                found.setdefault((law.verdict, law.detail), {}).setdefault(model, []).append(law.name)
    lines = []
    for (verdict, detail), models in found.items():
        names = dict.fromkeys(name for tried in models.values() for name in tried)
        which = "everything" if tuple(names) == NAMES else ", ".join(names)
        lines.append(f"- {which}, {verdict} ({', '.join(f'`{model}`' for model in models)}): {detail}")
    return "\n".join(lines)


def _judge(name: str, verdict: Verdict, law: Callable[[], float]) -> Law:
    try:
        error = law()
    except ConfigError as refusal:
        if verdict is True and name == "split":
            return Law(name, "refused", None, str(refusal))
        if verdict is True:
            return Law(name, "wrong", None, f"refused without saying so beforehand: {refusal}")
        return Law(name, "refused", None, str(verdict))
    except Exception as failure:  # noqa: BLE001 - whatever a model of somebody else raises is the finding
        return Law(
            name,
            "wrong",
            None,
            f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}",
        )
    if verdict is not True:
        return Law(name, "wrong", error, "said to be refused, and was not")
    if not error <= BOUND:
        return Law(name, "wrong", error, f"relative error {error:.1e}, {BOUND:.0e} is rounding")
    return Law(name, "exact", error)


# --- the laws -----------------------------------------------------------------------------------------------


def _rows(model: Any) -> list[Tensor]:
    """Three rows of ids (1, L) of different lengths, longer than a short attention window."""
    window = window_of(model.config) or 0
    base = 6 + window if window <= LONGEST_WINDOW else 6
    generator = torch.Generator().manual_seed(0)
    highest = model.config.vocab_size - 1
    return [torch.randint(1, highest, (1, base + more), generator=generator) for more in (2, 7, 0)]


def _embed(model: Any, ids: Tensor) -> Tensor:
    embeds: Tensor = model.get_input_embeddings()(ids)
    return embeds.detach()


def _alone(model: Any, row: Tensor) -> Tensor:
    """Hidden states (L, D) of a row by itself: what everything is compared with."""
    with torch.no_grad():
        return run_language_model(model, inputs_embeds=_embed(model, row)).hidden[0]


def _causal(model: Any, rows: Sequence[Tensor]) -> float:
    row = rows[1]
    whole = _alone(model, row)
    return max(_error(_alone(model, row[:, :cut]), whole[:cut]) for cut in range(1, row.shape[1]))


def _own_logits(model: Any, rows: Sequence[Tensor]) -> float:
    """Against the forward pass of transformers' own class, from ids to logits."""
    own = _transformers_model(model)
    with torch.no_grad():
        wanted = [own(input_ids=row, use_cache=False).logits[0] for row in rows]
        found = [language_logits(model, _alone(model, row)) for row in rows]
        some = language_logits(model, _alone(model, rows[1])[2:3])  # some rows, as a loss picks them
    return max(_error(some, wanted[1][2:3]), *(_error(f, w) for f, w in zip(found, wanted, strict=True)))


def _transformers_model(model: Any) -> Any:
    if model.config.model_type != "mamba":
        return model
    from transformers import MambaForCausalLM

    own = MambaForCausalLM(model.config).eval()
    own.load_state_dict(model.state_dict())
    return own


def _packed(model: Any, rows: Sequence[Tensor]) -> float:
    """Values and gradients of samples in one row, with padding behind them."""
    lengths = [row.shape[1] for row in rows]
    padding = rows[0][:, :2]
    embeds = _embed(model, torch.cat([*rows, padding], dim=1)).requires_grad_()
    seq_idx = torch.repeat_interleave(torch.arange(len(rows) + 1), torch.tensor([*lengths, 2]))[None].int()
    mask = (seq_idx < len(rows)).long()
    hidden = run_language_model(model, inputs_embeds=embeds, seq_idx=seq_idx, attention_mask=mask).hidden
    parts = hidden[:, : sum(lengths)].split(lengths, dim=1)
    plain = run_language_model(
        model, inputs_embeds=embeds, seq_idx=seq_idx
    ).hidden  # padding as one more sample
    return max(
        _error(plain[:, : sum(lengths)], hidden[:, : sum(lengths)]),
        _compare(model, [p[0] for p in parts], embeds, [slice(a, a + n) for a, n in _starts(lengths)], rows),
    )


def _starts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    at = 0
    for length in lengths:
        yield at, length
        at += length


def _padded(model: Any, rows: Sequence[Tensor], *, left: bool) -> float:
    """Values and gradients of rows padded to one length."""
    ids, mask = _pad(rows, left=left)
    embeds = _embed(model, ids).requires_grad_()
    hidden = run_language_model(model, inputs_embeds=embeds, attention_mask=mask).hidden
    width = ids.shape[1]
    places = [
        (i, slice(width - r.shape[1], None) if left else slice(0, r.shape[1])) for i, r in enumerate(rows)
    ]
    return _compare(model, [hidden[i][where] for i, where in places], embeds, places, rows)


def _pad(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    ids, mask = (
        torch.ones(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    for i, row in enumerate(rows):
        where = slice(width - row.shape[1], None) if left else slice(0, row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


def _compare(
    model: Any, parts: Sequence[Tensor], embeds: Tensor, places: Sequence[Any], rows: Sequence[Tensor]
) -> float:
    """Values and all gradients of samples run together, against the samples alone."""
    together = _gradients(model, parts, [embeds])
    leaves = [_embed(model, row).requires_grad_() for row in rows]
    singles = [run_language_model(model, inputs_embeds=leaf).hidden[0] for leaf in leaves]
    alone = _gradients(model, singles, leaves)
    errors = [_error(p.detach(), s.detach()) for p, s in zip(parts, singles, strict=True)]
    inputs = together.pop("input 0")
    for i, (place, row) in enumerate(zip(places, rows, strict=True)):
        index = place if isinstance(place, tuple) else (0, place)
        errors.append(_error(inputs[index], alone.pop(f"input {i}")[0]))
        assert inputs[index].shape[0] == row.shape[1]
    largest = max(gradient.abs().max() for gradient in alone.values())
    for name, gradient in alone.items():  # a gradient that cancels to nothing is rounding alone
        scale = max(gradient.abs().max(), GRADIENT_FLOOR * largest)
        errors.append(((together[name] - gradient).abs().max() / scale).item())
    return max(errors)


def _gradients(model: Any, parts: Sequence[Tensor], leaves: Sequence[Tensor]) -> Values:
    """Gradients of a weighted sum of the parts, of all parameters and of the inputs."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator) for part in parts]
    model.zero_grad(set_to_none=True)
    torch.stack([(part * weight).sum() for part, weight in zip(parts, weights, strict=True)]).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for i, leaf in enumerate(leaves):
        assert leaf.grad is not None
        found[f"input {i}"] = leaf.grad
    return found


def _stepped(model: Any, rows: Sequence[Tensor]) -> float:
    """One token at a time behind padded prompts, some rows leaving on the way."""
    prompts = [row[:, :-3] for row in rows]
    ids, mask = _pad(prompts, left=True)
    wanted = [_alone(model, row)[-4:] for row in rows]
    kept = list(range(len(rows)))
    errors = []
    with torch.no_grad():
        out = run_language_model(model, inputs_embeds=_embed(model, ids), attention_mask=mask, use_cache=True)
        errors += [_error(out.hidden[i, -1], wanted[i][0]) for i in kept]
        for step in range(3):
            if step == 2 and len(kept) > 1:
                kept = kept[::-2]
                out.cache.batch_select_indices(torch.tensor(kept))
                mask = mask[kept]
            token = torch.cat([rows[i][:, step - 3 : step - 2 or None] for i in kept])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            given = mask if family_of(model).needs_mask_after_prompt else None
            out = run_language_model(
                model,
                inputs_embeds=_embed(model, token),
                attention_mask=given,
                cache=out.cache,
                use_cache=True,
            )
            errors += [_error(out.hidden[at, 0], wanted[i][step + 1]) for at, i in enumerate(kept)]
    return max(errors)


def _continued(model: Any, rows: Sequence[Tensor]) -> float:
    """Several tokens onto a cache, as evaluation does: heads padded on the left, rests on the right, then a step."""
    rests = (3, 4, 0)[: len(rows)]
    cuts = [row.shape[1] - 1 - rest for row, rest in zip(rows, rests, strict=True)]
    ids, mask = _pad([row[:, :cut] for row, cut in zip(rows, cuts, strict=True)], left=True)
    wanted = [_alone(model, row) for row in rows]
    errors = []
    with torch.no_grad():
        out = run_language_model(model, inputs_embeds=_embed(model, ids), attention_mask=mask, use_cache=True)
        later, real = _pad([row[:, cut:-1] for row, cut in zip(rows, cuts, strict=True)], left=False)
        mask = torch.cat([mask, real], dim=1)
        out = run_language_model(
            model, inputs_embeds=_embed(model, later), attention_mask=mask, cache=out.cache, use_cache=True
        )
        for i, (cut, rest) in enumerate(zip(cuts, rests, strict=True)):
            if rest:
                errors.append(_error(out.hidden[i, :rest], wanted[i][cut:-1]))
        last = torch.cat([row[:, -1:] for row in rows])
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        given = mask if family_of(model).needs_mask_after_prompt else None
        out = run_language_model(
            model, inputs_embeds=_embed(model, last), attention_mask=given, cache=out.cache, use_cache=True
        )
    return max(*errors, *(_error(out.hidden[i, 0], wanted[i][-1]) for i in range(len(rows))))


def _split(model: Any, rows: Sequence[Tensor]) -> float:
    """One row in three parts onto a cache."""
    row = rows[1]
    parts = row.split([4, row.shape[1] - 7, 3], dim=1)
    cache = None
    found = []
    with torch.no_grad():
        for part in parts:
            out = run_language_model(model, inputs_embeds=_embed(model, part), cache=cache, use_cache=True)
            cache = out.cache
            found.append(out.hidden[0])
    return _error(torch.cat(found), _alone(model, row))


def _reloaded(model: Any, rows: Sequence[Tensor]) -> float:
    """Weights, buffers and logits after saving and loading."""
    with tempfile.TemporaryDirectory(prefix="vlmamba-check-") as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = load_language_model(folder, torch.float32).eval()
        errors = [
            _error(language_logits(again, _alone(again, r)), language_logits(model, _alone(model, r)))
            for r in rows
        ]
    before = dict([*model.named_parameters(), *model.named_buffers()])
    after = dict([*again.named_parameters(), *again.named_buffers()])
    if before.keys() != after.keys():
        return float("inf")
    return max(*errors, *(_error(after[name].detach(), before[name].detach()) for name in before))


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    if found.numel() == 0:
        return 0.0
    found, wanted = found.double(), wanted.double()
    difference = (found - wanted).abs().max()
    return (difference / wanted.abs().max().clamp(min=1e-30)).item() if difference else 0.0


@contextmanager
def _quiet_gradients(model: Any) -> Iterator[None]:
    """Gradients of all parameters for the time being, none behind."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.zero_grad(set_to_none=True)
