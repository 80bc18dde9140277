"""A question put to a model, and its greedy answer, ready to be explained.

Shapes: n images, V patches, F vision width, T visual tokens, D text width, L length, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmamba.errors import DataError
from vlmamba.models.language import language_logits, run_language_model
from vlmamba.models.modeling import VLMambaForConditionalGeneration
from vlmamba.models.processing import VLMambaProcessor


@dataclass(frozen=True)
class Answer:
    """One answered question.

    Attributes:
        question: As asked.
        text: The answer.
        tokens: K pieces of it, one a token (the end-of-text token only where it is all the answer).
        input_ids: (1, L), prompt and answer.
        first: Where the answer's first token stands.
        features: (n, V, F), what the vision tower gives.
        images: The pictures.
        log_probs: Of the answer's tokens, given what precedes them.
    """

    question: str
    text: str
    tokens: tuple[str, ...]
    input_ids: Tensor
    first: int
    features: Tensor
    images: tuple[Any, ...]
    log_probs: tuple[float, ...]

    def token_id(self, token: int) -> int:
        """Id of answer token `token`."""
        return int(self.input_ids[0, self.first + token])


@torch.no_grad()
def answer_question(
    model: VLMambaForConditionalGeneration,
    processor: VLMambaProcessor,
    images: Sequence[Any],
    question: str,
    *,
    max_new_tokens: int = 32,
) -> Answer:
    """Ask, and keep what explanations need.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        images: Pictures, shown before the question.
        question: The question.
        max_new_tokens: Longest answer.

    Raises:
        DataError: There is no image, or the model says nothing.
    """
    if not images:
        raise DataError(
            "the question has no image: give one (--image PATH); without it there are no patches to explain"
        )
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": "\n" + question})
    messages = [{"role": "user", "content": content}]
    batch = processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_tensors="pt"
    ).to(model.device)
    first = batch["input_ids"].shape[1]
    ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    said = ids[0, first:].tolist()
    while len(said) > 1 and said[-1] in (processor.tokenizer.eos_token_id, processor.pad_token_id):
        said.pop()
    features = model.vision_tower(batch["pixel_values"])
    features = features.to(next(model.multi_modal_projector.parameters()).dtype)
    ids = ids[:, : first + len(said)]
    _, logits = run_from_features(model, ids, features)
    log_probs = logits[0, first - 1 : -1].log_softmax(-1).gather(-1, ids[0, first:, None])[:, 0]
    return Answer(
        question=question,
        text=processor.tokenizer.decode(said, skip_special_tokens=True).strip(),
        tokens=tuple(processor.tokenizer.decode([token]) for token in said),
        input_ids=ids,
        first=first,
        features=features,
        images=tuple(images),
        log_probs=tuple(log_probs.tolist()),
    )


def run_from_features(
    model: VLMambaForConditionalGeneration, input_ids: Tensor, features: Tensor, rows: int = 1
) -> tuple[Tensor, Tensor]:
    """The model from the tower's features on, differentiable in them.

    Args:
        model: The model.
        input_ids: (1, L), the same for all rows.
        features: (rows * n, V, F).
        rows: B.

    Returns:
        Visual tokens (B * n, T, D) and logits (B, L, vocabulary), fp32.
    """
    visual = model.multi_modal_projector(features)
    ids = input_ids.expand(rows, -1)
    places = (ids == model.config.image_token_id).unsqueeze(-1)
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter(places, visual.to(embeds.dtype))
    hidden = run_language_model(model.language_model, inputs_embeds=embeds).hidden
    return visual, language_logits(model.language_model, hidden)
