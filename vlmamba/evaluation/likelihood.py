"""How likely a model holds each of several given answers, without generating any.

A prompt with its pictures is encoded and scanned once; its state is then copied for every option, and all
options of a batch go on from there together. The sum and the per-token mean of the log-probabilities are
those of the plain way (each option behind the whole prompt anew) up to rounding.

An option counts as it would stand in an answer (the chat template decides about the space in front of it),
without the token that ends answers. So "1" is never less likely than "10": where one option begins another,
put them in a form that ends alike, or rank by the mean.

Shapes: B questions, O options of all of them, L length of the longest prompt, T tokens of the longest option,
X vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmamba.errors import DataError
from vlmamba.evaluation.generation import (
    Prompted,
    Question,
    encode_question,
    evaluating,
    pad_right,
    run_prompts,
)
from vlmamba.evaluation.task import Sample


class OptionScore(NamedTuple):
    """How likely one option is."""

    total: float
    """Sum of its tokens' log-probabilities (natural)."""
    tokens: int
    greedy: bool
    """Whether greedy generation would begin with it."""

    @property
    def mean(self) -> float:
        """Log-probability per token."""
        return self.total / self.tokens


def encode_options(
    processor: Any, sample: Sample, messages: Sequence[Mapping[str, Any]], options: Sequence[str]
) -> Question:
    """A question with its options as continuations of the prompt.

    Args:
        processor: The model's processor.
        sample: Whose pictures.
        messages: The conversation up to the answer.
        options: The answers to compare.

    Raises:
        DataError: There is no option, one is empty, or the chat template changes the prompt when an answer
            follows.
    """
    if not options:
        raise DataError(f"question {sample.question_id!r} has no options to score")
    question = encode_question(processor, sample, messages)
    prompt = question.input_ids
    continuations = []
    for option in options:
        whole = processor.encode_messages([*messages, {"role": "assistant", "content": option}])
        if whole.input_ids[: len(prompt)] != prompt:
            raise DataError(
                f"question {sample.question_id!r}: the chat template writes the prompt differently when an "
                "answer follows, so options cannot be scored as its continuations"
            )
        ids = whole.input_ids[len(prompt) :]
        while ids and ids[-1] == processor.tokenizer.eos_token_id:
            ids.pop()
        if not ids:
            raise DataError(f"question {sample.question_id!r}: option {option!r} has no token")
        continuations.append(ids)
    return question._replace(options=tuple(continuations))


def score_options(model: Any, processor: Any, questions: Sequence[Question]) -> list[list[OptionScore]]:
    """Score every option of a batch of questions.

    Args:
        model: A `VLMambaForConditionalGeneration`.
        processor: Its processor.
        questions: From `encode_options`.

    Returns:
        For each question the scores of its options, in their order.
    """
    with evaluating(model), torch.inference_mode():
        prompted = run_prompts(model, processor, questions)
        owners = [row for row, q in enumerate(questions) for _ in q.options]
        options = [ids for q in questions for ids in q.options]
        rows = torch.tensor(owners, device=model.device)
        logits = prompted.logits[rows][:, None]
        if max(map(len, options)) > 1:
            later = _continue(model, prompted.select(rows), options)
            logits = torch.cat([logits, later], dim=1)  # (O, T, X)
        scores = iter(_scores(logits, options))
    return [[next(scores) for _ in q.options] for q in questions]


def _continue(model: Any, prompted: Prompted, options: Sequence[Sequence[int]]) -> Tensor:
    """Logits (O, T-1, X) behind each option's tokens but its last, from the prompts' states."""
    ids, real = pad_right([option[:-1] for option in options], prompted.mask.device)
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=torch.cat([prompted.mask, real], dim=1),
        cache=prompted.cache,
        use_cache=True,
    ).logits
    return logits


def _scores(logits: Tensor, options: Sequence[Sequence[int]]) -> list[OptionScore]:
    """From logits (O, T, X) that predict the options' tokens, padded on the right."""
    width = logits.shape[1]
    ids = torch.tensor([[*option, *[0] * (width - len(option))] for option in options], device=logits.device)
    lengths = torch.tensor([len(option) for option in options], device=logits.device)
    real = torch.arange(width, device=logits.device) < lengths[:, None]
    chosen = logits.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]
    totals = chosen.double().masked_fill(~real, 0.0).sum(dim=1)
    greedy = ((logits.argmax(dim=-1) == ids) | ~real).all(dim=1)
    return [
        OptionScore(total, len(option), likeliest)
        for total, option, likeliest in zip(totals.tolist(), options, greedy.tolist(), strict=True)
    ]
