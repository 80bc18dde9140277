"""From questions to a model's inputs, and greedy answers whose text does not depend on the batch.

A prompt is run in two parts: up to its last picture, and the rest. Questions of a batch whose first parts are the same
(several questions about one picture) run it once and go on from copies of its state; pictures are most of a prompt,
so this is most of the work. The cut is where it is for every batch, so answers do not depend on who shares. A language
model that cannot go on from a cache exactly (`LanguageFamily.continues`) runs prompts in one part.

Shapes: B rows of a batch, L length of the longest row, n pictures of the batch, C channels, S image size,
X vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmamba.errors import DataError, ImageError
from vlmamba.evaluation.task import Sample, StoredImage, image_first
from vlmamba.models.language import family_of
from vlmamba.models.language.versions import cache_of


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
        DataError: The prompt asks for another number of pictures than the sample has, or is empty.
    """
    encoded = processor.encode_messages(messages, add_generation_prompt=True)
    if encoded.num_images != len(sample.images):
        raise DataError(
            f"the prompt of question {sample.question_id!r} has {encoded.num_images} picture(s), the sample "
            f"{len(sample.images)}"
        )
    if not encoded.input_ids:
        raise DataError(
            f"the prompt of question {sample.question_id!r} is empty: the chat template leaves out its text"
        )
    return Question(sample, encoded.input_ids)


def model_inputs(model: Any, processor: Any, questions: Sequence[Question]) -> dict[str, Tensor | None]:
    """Prompts padded on the left, (B, L) ids and mask, and the (n, C, S, S) pixels of all rows or None."""
    width = max(len(q.input_ids) for q in questions)
    device = model.device
    ids = [[processor.pad_token_id] * (width - len(q.input_ids)) + q.input_ids for q in questions]
    mask = [[0] * (width - len(q.input_ids)) + [1] * len(q.input_ids) for q in questions]
    pictures = [picture for q in questions for picture in open_pictures(processor, q.sample)]
    pixels = None
    if pictures:
        pixels = processor.image_processor(pictures)["pixel_values"].to(device, model.dtype)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "pixel_values": pixels,
    }


@dataclasses.dataclass
class Prompted:
    """Prompts that were run.

    Attributes:
        cache: Of the language model, B rows.
        mask: (B, columns of the cache), 0 at padding, which may be anywhere.
        logits: (B, X) of the first token to come.
    """

    cache: Any
    mask: Tensor
    logits: Tensor

    def select(self, rows: Tensor) -> Prompted:
        """Continue with these rows, which may repeat; the cache is changed in place."""
        self.cache.batch_select_indices(rows)
        return Prompted(self.cache, self.mask[rows], self.logits[rows])


def run_prompts(model: Any, processor: Any, questions: Sequence[Question]) -> Prompted:
    """Run the prompts of a batch; what several have in common up to their last picture, once."""
    cuts = [len(q.input_ids) for q in questions]
    if continues(model):
        cuts = [_after_pictures(q.input_ids, processor.image_token_id) for q in questions]
    firsts: dict[Hashable, int] = {}
    owners: list[int] = []
    heads: list[Question] = []
    for question, cut in zip(questions, cuts, strict=True):
        key = (tuple(question.input_ids[:cut]), picture_key(question.sample))
        if key not in firsts:
            firsts[key] = len(heads)
            heads.append(question._replace(input_ids=question.input_ids[:cut]))
        owners.append(firsts[key])
    inputs = model_inputs(model, processor, heads)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    mask = inputs["attention_mask"]
    assert mask is not None
    prompted = Prompted(cache_of(output), mask, output.logits[:, -1])
    if len(heads) < len(questions):
        prompted = prompted.select(torch.tensor(owners, device=mask.device))
    rest = [q.input_ids[cut:] for q, cut in zip(questions, cuts, strict=True)]
    return _run_rest(model, prompted, rest)


def continues(model: Any) -> bool:
    """Whether the language model goes on from a cache with several tokens, padded as a batch needs it."""
    return family_of(model.language_model).continues is True


def _run_rest(model: Any, prompted: Prompted, rest: Sequence[Sequence[int]]) -> Prompted:
    """Run what follows the pictures, padded on the right; rows may have nothing left."""
    if not any(rest):
        return prompted
    ids, real = pad_right(rest, prompted.mask.device)
    mask = torch.cat([prompted.mask, real], dim=1)
    output = model(
        input_ids=ids,
        attention_mask=mask,
        cache=prompted.cache,
        use_cache=True,
        logits_to_keep=1,  # with a mask: each row's last real token
    )
    logits = torch.where(real.any(dim=1, keepdim=True), output.logits[:, -1], prompted.logits)
    return Prompted(prompted.cache, mask, logits)


def pad_right(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L) of rows of different lengths."""
    width = max(map(len, rows))
    ids = [[*row, *[0] * (width - len(row))] for row in rows]
    real = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def _after_pictures(ids: Sequence[int], image_token_id: int) -> int:
    """Length of a prompt up to its last picture; without one, all of it."""
    for at in range(len(ids) - 1, -1, -1):
        if ids[at] == image_token_id:
            return at + 1
    return len(ids)


def picture_key(sample: Sample) -> Hashable:
    """The same for questions with the same pictures (told by file name; open ones by identity)."""
    return tuple(
        image if isinstance(image, Path | StoredImage | bytes) else id(image) for image in sample.images
    )


def generate_answers(
    model: Any, processor: Any, questions: Sequence[Question], *, max_new_tokens: int
) -> list[Reply]:
    """Greedy answers to a batch of questions: the tokens that `model.generate` gives without sampling."""
    ends = end_ids(model, processor)
    needs_mask = family_of(model.language_model).needs_mask_after_prompt
    written: list[list[int]] = [[] for _ in questions]
    with evaluating(model), torch.inference_mode():
        now = run_prompts(model, processor, questions)
        rows = list(range(len(questions)))
        for step in range(max_new_tokens):
            chosen = now.logits.argmax(dim=-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if not written[row] or written[row][-1] not in ends:
                    written[row].append(token)
            going = [at for at, row in enumerate(rows) if written[row][-1] not in ends]
            if not going or step + 1 == max_new_tokens:
                break
            if 2 * len(going) <= len(rows):  # rows that ended leave the batch, when that is worth a copy
                kept = torch.tensor(going, device=chosen.device)
                now, chosen, rows = now.select(kept), chosen[kept], [rows[at] for at in going]
            mask = torch.cat([now.mask, torch.ones_like(now.mask[:, :1])], dim=1) if needs_mask else now.mask
            output = model(
                input_ids=chosen[:, None],
                attention_mask=mask if needs_mask else None,
                cache=now.cache,
                use_cache=True,
                logits_to_keep=0,
            )
            now = Prompted(now.cache, mask, output.logits[:, -1])
    return [_reply(processor, ids, ends) for ids in written]


def sample_answers(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    streamer: Any = None,
    stopping_criteria: Any = None,
    **options: Any,
) -> list[Reply]:
    """Answers by transformers' `generate`, with its options (do_sample, temperature, top_p, num_beams, ...)."""
    from transformers import GenerationConfig

    ends = end_ids(model, processor)
    settings = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **options}
    config = GenerationConfig(
        **settings,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=processor.pad_token_id,
        use_cache=True,
    )
    with evaluating(model), torch.inference_mode():
        inputs = model_inputs(model, processor, questions)
        sequences = model.generate(
            **inputs, generation_config=config, streamer=streamer, stopping_criteria=stopping_criteria
        )
    width = max(len(q.input_ids) for q in questions)
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


def open_pictures(processor: Any, sample: Sample) -> list[Any]:
    """The pictures of a question, as the model is to see them.

    Raises:
        ImageError: One cannot be read; the message names the question.
    """
    try:
        return [processor.image_processor.open(image) for image in sample.images]
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


def end_ids(model: Any, processor: Any) -> list[int]:
    """Ids that end an answer: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or [])
    return list(dict.fromkeys([*ids, processor.tokenizer.eos_token_id]))


def _reply(processor: Any, ids: list[int], ends: Sequence[int]) -> Reply:
    end = next((at for at, token in enumerate(ids) if token in ends), None)
    text = processor.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
    return Reply(text, len(ids) if end is None else end + 1, end is None)
