"""Asking a model the questions of a task: batched greedy generation whose answers do not depend on the batch.

Answers are appended to a file as they come; what is already there is not asked again.

Shapes: B rows of a batch, L length of the longest prompt, n pictures of the batch, C channels, S image size,
T new tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlmamba.data.images import find_image, open_image
from vlmamba.errors import ConfigError, DataError, ImageError
from vlmamba.evaluation.records import Record, RecordFile, record_key
from vlmamba.evaluation.scoring import score_records
from vlmamba.evaluation.shuffle import shuffle_images as deal_images
from vlmamba.evaluation.task import Sample, Task, image_first

WINDOW = 16
"""Batches that are sorted by length together, so that rows of a batch need little padding."""


class Reply(NamedTuple):
    """One generated answer."""

    text: str
    tokens: int
    """New tokens, the end-of-text token included."""
    cut: bool
    """Whether the limit on new tokens ended it."""


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    output: str | Path,
    batch_size: int = 32,
    limit: int | None = None,
    shuffle_images: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Ask every question of a task and score the answers.

    Args:
        model: A `VLMambaForConditionalGeneration` (or what has its `generate`).
        processor: Its processor.
        task: The questions.
        output: The answer file; questions it already holds are not asked again.
        batch_size: Questions at a time. Answers are the same for every size (in fp32).
        limit: Only the first so many questions.
        shuffle_images: Give every question the pictures of another (see `vlmamba.evaluation.shuffle`).
        progress: Show a bar with the time left.

    Returns:
        ``{"task", "metrics", "counts", "settings", "seconds"}``; counts are asked, answered, missing,
        unparsable, cut (ended by the token limit) and resumed (found in the file).

    Raises:
        ConfigError: `batch_size` or `limit` is not positive.
        ImageError: Pictures are missing; the message counts them and names the first.
        DataError: The file holds answers given under other settings, or to other questions.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    samples = list(task.samples)
    if shuffle_images:
        samples = deal_images(samples)
    samples = samples[:limit]
    check_images(samples)
    settings = {
        "task": task.name,
        "data": task.fingerprint,
        "model": model_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "decoding": "greedy",
        "max_new_tokens": task.max_new_tokens,
        "shuffle_images": shuffle_images,
    }
    run_id = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    started = time.perf_counter()
    with RecordFile(output) as file:
        done = _done(file, task, run_id)
        pending = [sample for sample in samples if sample.key not in done]
        bar = progress_bar(len(samples), len(samples) - len(pending), task.name, enabled=progress)
        try:
            for batch in _batches(processor, task, pending, batch_size):
                replies = generate_answers(model, processor, batch, max_new_tokens=task.max_new_tokens)
                rows = [_record(q.sample, r, run_id) for q, r in zip(batch, replies, strict=True)]
                file.append(rows)
                done.update({record_key(row): row for row in rows})
                bar.update(len(rows))
        finally:
            bar.close()
    result = score_records(task, samples, done)
    result["counts"]["resumed"] = len(samples) - len(pending)
    return {**result, "settings": settings, "seconds": round(time.perf_counter() - started, 3)}


class Question(NamedTuple):
    """A sample with its prompt's ids."""

    sample: Sample
    input_ids: list[int]


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


def generate_answers(
    model: Any, processor: Any, questions: Sequence[Question], *, max_new_tokens: int
) -> list[Reply]:
    """Greedy answers to a batch of questions, padded on the left."""
    width = max(len(q.input_ids) for q in questions)
    device = model.device
    ids = [[processor.pad_token_id] * (width - len(q.input_ids)) + q.input_ids for q in questions]
    mask = [[0] * (width - len(q.input_ids)) + [1] * len(q.input_ids) for q in questions]
    pictures = [picture for q in questions for picture in _pictures(q.sample)]
    pixels = None
    if pictures:
        pixels = processor.image_processor(pictures)["pixel_values"].to(device, model.dtype)
    ends = _end_ids(model, processor)
    with _evaluating(model), torch.inference_mode():
        sequences = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            pixel_values=pixels,
            generation_config=_greedy(max_new_tokens, ends, processor.pad_token_id),
        )
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


def check_images(samples: Sequence[Sample]) -> None:
    """Make sure that every picture named is there before the first question is asked.

    Raises:
        ImageError: Some are not; the message counts them and names the first.
    """
    missing: dict[Path, str | int] = {}
    for sample in samples:
        for image in sample.images:
            if isinstance(image, Path) and image not in missing:
                try:
                    find_image(image)
                except ImageError:
                    missing[image] = sample.question_id
    if missing:
        examples = ", ".join(
            f"{path} (question {question!r})" for path, question in list(missing.items())[:3]
        )
        raise ImageError(f"{len(missing)} picture(s) that the questions need are missing, such as {examples}")


def model_fingerprint(model: Any) -> str:
    """Changes with the weights: from every tensor its name, shape and some hundred values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def progress_bar(total: int, initial: int, label: str, *, enabled: bool) -> Any:
    """A tqdm bar with the time left; plain lines now and then where there is no terminal."""
    from tqdm.auto import tqdm

    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit="question",
        disable=not enabled or os.environ.get("VLMAMBA_PROGRESS") == "0",
        dynamic_ncols=interactive,
        mininterval=0.5 if interactive else 30.0,
    )


def _batches(
    processor: Any, task: Task, samples: Sequence[Sample], batch_size: int
) -> Iterator[list[Question]]:
    """Questions in batches of like length; encoded as they are needed."""
    for start in range(0, len(samples), batch_size * WINDOW):
        window = samples[start : start + batch_size * WINDOW]
        questions = [encode_question(processor, s, task.prompt(s)) for s in window]
        questions.sort(key=lambda q: len(q.input_ids))
        for at in range(0, len(questions), batch_size):
            yield questions[at : at + batch_size]


def _done(file: RecordFile, task: Task, run_id: str) -> dict[tuple[str, str], Record]:
    """Answers that are in the file, checked to be of this task, model and settings."""
    foreign = [r for r in file.records if r.get("metadata", {}).get("settings") != run_id]
    if foreign:
        raise DataError(
            f"{file.path} holds {len(foreign)} answer(s) given by another model, data or settings (such as "
            f"to question {foreign[0]['question_id']!r}). Choose another output, or delete the file to ask "
            "again"
        )
    known = {sample.key for sample in task.samples}
    done = {record_key(record): record for record in file.records}
    strange = [key[0] for key in done if key not in known]
    if strange:
        raise DataError(
            f"{file.path} answers {len(strange)} question(s) that {task.name!r} does not ask, such as "
            f"{strange[0]!r}"
        )
    return done


def _record(sample: Sample, reply: Reply, run_id: str) -> Record:
    metadata: dict[str, Any] = {"settings": run_id, "tokens": reply.tokens, "cut": reply.cut}
    if "images_from" in sample.metadata:
        metadata["images_from"] = sample.metadata["images_from"]
    return {
        "question_id": sample.question_id,
        "prompt": sample.text,
        "text": reply.text,
        "model_id": "vlmamba",
        "metadata": metadata,
    }


def _pictures(sample: Sample) -> list[Any]:
    try:
        return [open_image(image) for image in sample.images]
    except ImageError as error:
        raise ImageError(f"question {sample.question_id!r}: {error}") from error


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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the time being."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
