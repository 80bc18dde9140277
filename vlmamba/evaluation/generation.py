"""From questions to a model's inputs, and greedy answers whose text does not depend on the batch.

Shapes: B rows of a batch, L length of the longest prompt, n pictures of the batch, C channels, S image size,
T new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from vlmamba.data.images import open_image
from vlmamba.errors import DataError, ImageError
from vlmamba.evaluation.task import Sample, fetch_image, image_first


class Question(NamedTuple):
    """A sample with its prompt's ids."""

    sample: Sample
    input_ids: list[int]
    options: tuple[list[int], ...] = ()
    """Ids of each option as a continuation of the prompt, where options are to be scored."""


class Reply(NamedTuple):
    """One generated answer."""

    text: str
    tokens: int
    """New tokens, the end-of-text token included."""
    cut: bool
    """Whether the limit on new tokens ended it."""


def encode_question(processor: Any, sample: Sample, messages: Sequence[Mapping[str, Any]]) -> Question:
    """Ids of the prompt, up to where the answer begins.

    Raises:
        DataError: The prompt asks for another number of pictures than the sample has.
    """
    encoded = processor.encode_messages(messages, add_generation_prompt=True)
    if encoded.num_images != len(sample.images):
        raise DataError(
            f"the prompt of question {sample.question_id!r} has {encoded.num_images} picture(s), the sample "
            f"{len(sample.images)}"
        )
    return Question(sample, encoded.input_ids)


def model_inputs(model: Any, processor: Any, questions: Sequence[Question]) -> dict[str, torch.Tensor | None]:
    """Prompts padded on the left, (B, L) ids and mask, and the (n, C, S, S) pixels of all rows or None."""
    width = max(len(q.input_ids) for q in questions)
    device = model.device
    ids = [[processor.pad_token_id] * (width - len(q.input_ids)) + q.input_ids for q in questions]
    mask = [[0] * (width - len(q.input_ids)) + [1] * len(q.input_ids) for q in questions]
    pictures = [picture for q in questions for picture in open_pictures(q.sample)]
    pixels = None
    if pictures:
        pixels = processor.image_processor(pictures)["pixel_values"].to(device, model.dtype)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "pixel_values": pixels,
    }


def generate_answers(
    model: Any, processor: Any, questions: Sequence[Question], *, max_new_tokens: int
) -> list[Reply]:
    """Greedy answers to a batch of questions, padded on the left."""
    ends = _end_ids(model, processor)
    with evaluating(model), torch.inference_mode():
        inputs = model_inputs(model, processor, questions)
        sequences = model.generate(
            **inputs, generation_config=_greedy(max_new_tokens, ends, processor.pad_token_id)
        )
    width = inputs["input_ids"].shape[1]  # type: ignore[union-attr]
    return [_reply(processor, row, ends) for row in sequences[:, width:].tolist()]


def converse(model: Any, processor: Any, samples: Sequence[Sample], *, max_new_tokens: int) -> list[Reply]:
    """Ask questions about the same pictures one after another in one conversation.

    Args:
        model: The model.
        processor: Its processor.
        samples: The questions; the pictures are those of the first.
        max_new_tokens: Longest answer.

    Returns:
        The answer to each; the model sees its own earlier answers.
    """
    first = samples[0]
    messages: list[dict[str, Any]] = []
    replies: list[Reply] = []
    for number, sample in enumerate(samples):
        turn = sample if number == 0 else dataclasses.replace(sample, images=())
        messages += image_first(turn)
        question = encode_question(processor, first, messages)
        reply = generate_answers(model, processor, [question], max_new_tokens=max_new_tokens)[0]
        messages.append({"role": "assistant", "content": reply.text})
        replies.append(reply)
    return replies


def open_pictures(sample: Sample) -> list[Any]:
    """The pictures of a question.

    Raises:
        ImageError: One cannot be read; the message names the question.
    """
    try:
        return [open_image(fetch_image(image)) for image in sample.images]
    except ImageError as error:
        raise ImageError(f"question {sample.question_id!r}: {error}") from error


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the time being."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _greedy(max_new_tokens: int, ends: Sequence[int], pad: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        use_cache=True,
    )


def _end_ids(model: Any, processor: Any) -> list[int]:
    """Ids that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([*ids, processor.tokenizer.eos_token_id]))


def _reply(processor: Any, ids: list[int], ends: Sequence[int]) -> Reply:
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    text = processor.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    return Reply(text, len(ids) if end is None else end + 1, end is None)
