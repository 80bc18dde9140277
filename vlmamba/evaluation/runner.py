"""Asking a model the questions of a task, in batches that do not change its answers.

Answers are appended to a file as they come; what is already there is not asked again. Several processes share
the questions, write a file each, and the first merges and scores.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from vlmamba.common.images import find_image
from vlmamba.common.processes import Group
from vlmamba.common.progress import progress_bar
from vlmamba.errors import ConfigError, DataError, ImageError
from vlmamba.evaluation.generation import (
    Question,
    Reply,
    converse,
    encode_question,
    generate_answers,
    image_first,
    picture_key,
)
from vlmamba.evaluation.likelihood import OptionScore, encode_options, score_options
from vlmamba.evaluation.records import (
    Record,
    append_records,
    lock_answers,
    mend_records,
    merge_parts,
    part_path,
)
from vlmamba.evaluation.scoring import score_records
from vlmamba.evaluation.shuffle import shuffle_images as deal_images
from vlmamba.evaluation.task import Sample, Task, first_questions

__all__ = [
    "Question",
    "Reply",
    "check_images",
    "converse",
    "encode_question",
    "evaluate",
    "generate_answers",
    "image_first",
    "model_fingerprint",
]

T = TypeVar("T")

log = logging.getLogger(__name__)

WINDOW = 16
"""Batches that are sorted by length together, so that rows of a batch need little padding."""
AUTO_BATCH = {"cuda": 128, "cpu": 32}
"""What "auto" begins with."""

Answers = dict[tuple[str, str], Record]


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    output: str | Path,
    batch_size: int | Literal["auto"] = 32,
    limit: int | None = None,
    shuffle_images: bool = False,
    progress: bool = True,
    *,
    switches: Mapping[str, Any] | None = None,
    ranks: Group | None = None,
) -> dict[str, Any]:
    """Ask every question of a task and score the answers.

    Args:
        model: A `VLMambaForConditionalGeneration` (or what has its `generate`).
        processor: Its processor.
        task: The questions.
        output: The answer file; questions it already holds are not asked again.
        batch_size: Questions at a time; "auto" begins high and halves it when memory runs out. Answers are
            the same for every size (in fp32).
        limit: Only the first so many questions (and those that are scored together with one of them).
        shuffle_images: Give every question the pictures of another (see `vlmamba.evaluation.shuffle`).
        progress: Show a bar with the time left.
        switches: What was changed in the trained connector, for the record.
        ranks: This process among those that share the questions; it alone when left out.

    Returns:
        The result of `vlmamba.evaluation.scoring.score_records` with "settings" and "seconds"; its counts
        also say how many answers were found in the file (resumed). The same in all processes.

    Raises:
        ConfigError: `batch_size` or `limit` is not positive, or the batch does not fit into memory.
        ImageError: Pictures are missing; the message counts them and names the first.
        DataError: The file holds answers given under other settings, or to other questions, or another
            evaluation is writing it.
    """
    size = BatchSize(batch_size, model.device.type)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    samples = deal_images(list(task.samples)) if shuffle_images else list(task.samples)
    samples = first_questions(samples, limit)
    check_images(samples)
    identity = answer_settings(model, processor, task, shuffle_images=shuffle_images)
    if switches:
        identity["switches"] = dict(switches)
    run_id = fingerprint(identity)
    path, ranks, started = Path(output), ranks or Group(), time.perf_counter()
    order = [sample.key for sample in task.samples]

    def merge() -> Answers:
        return check_answers(path, merge_parts(path, order), task, run_id)

    with lock_answers(path if ranks.is_main else part_path(path, ranks.rank)):
        done = ranks.on_main(merge)
        pending = [sample for sample in samples if sample.key not in done]
        mine = [sample for group in ranks.share(group_by_pictures(pending)) for sample in group]
        own = path if ranks.world_size == 1 else part_path(path, ranks.rank)
        label = task.name if ranks.world_size == 1 else f"{task.name} (process 1 of {ranks.world_size})"
        known = len(samples) - len(pending)
        show = progress and ranks.is_main
        bar = progress_bar(known + len(mine), label, "question", initial=known, enabled=show)
        mend_records(own)
        with bar:
            for answers in _ask(model, processor, task, mine, size):
                rows = ({**row, "metadata": {"settings": run_id, **row["metadata"]}} for row in answers)
                append_records(own, rows)
                bar.update(len(answers))
        ranks.barrier()
        result = ranks.on_main(lambda: score_records(task, samples, merge(), path))
    result["counts"]["resumed"] = len(samples) - len(pending)
    settings = {
        **identity,
        "limit": limit,
        "batch_size": size.now,
        "processes": ranks.world_size,
        "device": model.device.type,
    }
    return {**result, "settings": settings, "seconds": round(time.perf_counter() - started, 3)}


def answer_settings(model: Any, processor: Any, task: Task, *, shuffle_images: bool) -> dict[str, Any]:
    """What an answer depends on: answers given under other settings are not mixed."""
    how: dict[str, Any] = {"method": "generate", "decoding": "greedy", "max_new_tokens": task.max_new_tokens}
    if task.method == "likelihood":
        how = {"method": "likelihood", "rank_by": "mean" if task.normalised else "sum"}
    return {
        "task": task.name,
        "data": task.fingerprint,
        "model": model_fingerprint(model),
        "processor": fingerprint([processor.chat_template, processor.image_processor.to_dict()]),
        "dtype": str(model.dtype).removeprefix("torch."),
        **how,
        "shuffle_images": shuffle_images,
    }


class BatchSize:
    """How many questions to ask at a time.

    Args:
        wanted: A number, or "auto": begin with `AUTO_BATCH` and halve it whenever memory runs out.
        device: Kind of device.

    Raises:
        ConfigError: The number is not positive, or a word other than "auto".
    """

    def __init__(self, wanted: int | str, device: str = "cpu") -> None:
        if wanted != "auto" and (not isinstance(wanted, int) or wanted < 1):
            raise ConfigError(f"batch_size must be at least 1, got {wanted}; or auto")
        self.automatic = wanted == "auto"
        self.now: int = AUTO_BATCH.get(device, AUTO_BATCH["cuda"]) if wanted == "auto" else int(wanted)

    def shrink(self, tried: int) -> None:
        """Memory did not suffice for so many.

        Raises:
            ConfigError: The size was given, or cannot be smaller.
        """
        if not self.automatic or tried == 1:
            advice = "Use batch_size auto, or a smaller one" if tried > 1 else "This model needs a larger one"
            raise ConfigError(f"a batch of {tried} question(s) does not fit into the memory. {advice}")
        self.now = math.ceil(tried / 2)
        log.info("memory did not suffice for %d questions at a time; going on with %d", tried, self.now)


def _ask(
    model: Any, processor: Any, task: Task, samples: Sequence[Sample], size: BatchSize
) -> Iterator[list[Record]]:
    """Answers in batches, encoded as they are needed.

    Questions about the same pictures stay together, since they share most of their prompt; besides, the
    longest come first, so that rows of a batch need little padding and a lack of memory shows at once.
    """
    start = 0
    while start < len(samples):
        window = samples[start : start + size.now * WINDOW]
        start += len(window)
        questions = {sample.key: _encode(processor, task, sample) for sample in window}
        groups = [[questions[sample.key] for sample in group] for group in group_by_pictures(window)]
        groups.sort(key=lambda group: -max(len(q.input_ids) for q in group))
        queue = deque(question for group in groups for question in group)
        while queue:
            batch = [queue.popleft() for _ in range(min(size.now, len(queue)))]
            answers = _try(model, processor, task, batch)
            if answers is None:
                size.shrink(len(batch))
                queue.extendleft(reversed(batch))
            else:
                yield answers


def group_by_pictures(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Questions about the same pictures together, in the order in which they first come."""
    groups: dict[Any, list[Sample]] = {}
    for at, sample in enumerate(samples):
        groups.setdefault(picture_key(sample) if sample.images else at, []).append(sample)
    return list(groups.values())


def _encode(processor: Any, task: Task, sample: Sample) -> Question:
    messages = task.prompt(sample)
    if task.method == "likelihood":
        return encode_options(processor, sample, messages, sample.options)
    return encode_question(processor, sample, messages)


def _try(model: Any, processor: Any, task: Task, batch: Sequence[Question]) -> list[Record] | None:
    """The answers of a batch, or None where memory ran out."""

    def answer() -> list[Record]:
        if task.method == "likelihood":
            scored = score_options(model, processor, batch)
            return [_chosen(q.sample, s, task.normalised) for q, s in zip(batch, scored, strict=True)]
        replies = generate_answers(model, processor, batch, max_new_tokens=task.max_new_tokens)
        return [_generated(q.sample, reply) for q, reply in zip(batch, replies, strict=True)]

    return out_of_memory_is_none(answer, model.device.type)


def out_of_memory_is_none(function: Callable[[], T], device: str) -> T | None:
    """What a function returns, or None (and memory given back) where there was too little memory for it."""
    try:
        return function()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch, where the host has no memory left
            raise
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return None


def _generated(sample: Sample, reply: Reply) -> Record:
    return _record(sample, reply.text, {"tokens": reply.tokens, "cut": reply.cut})


def _chosen(sample: Sample, scores: Sequence[OptionScore], normalised: bool) -> Record:
    values = [score.mean if normalised else score.total for score in scores]
    best = max(range(len(values)), key=values.__getitem__)
    return _record(
        sample, sample.options[best], {"scores": values, "tokens": [score.tokens for score in scores]}
    )


def _record(sample: Sample, text: str, metadata: dict[str, Any]) -> Record:
    if "images_from" in sample.metadata:
        metadata["images_from"] = sample.metadata["images_from"]
    return {
        "question_id": sample.question_id,
        "prompt": sample.text,
        "text": text,
        "model_id": "vlmamba",
        "metadata": metadata,
    }


def check_answers(path: Path, done: Answers, task: Task, run_id: str) -> Answers:
    """Answers found in a file, if all are of this task, model and settings.

    Raises:
        DataError: Some are not.
    """
    foreign = [r for r in done.values() if (r.get("metadata") or {}).get("settings") != run_id]
    if foreign:
        raise DataError(
            f"{path} holds {len(foreign)} answer(s) given by another model, data or settings (such as "
            f"to question {foreign[0]['question_id']!r}). Choose another output, or forget these answers "
            "(vlmamba eval --fresh)"
        )
    known = {sample.key for sample in task.samples}
    strange = [key[0] for key in done if key not in known]
    if strange:
        raise DataError(
            f"{path} answers {len(strange)} question(s) that {task.name!r} does not ask, such as "
            f"{strange[0]!r}"
        )
    return done


def check_images(samples: Sequence[Sample]) -> None:
    """Make sure that every picture named is there before the first question is asked.

    Raises:
        ImageError: Some are not; the message counts them and names the first.
    """
    found: set[Path] = set()
    missing: dict[Path, str | int] = {}
    for sample in samples:
        for image in sample.images:
            if isinstance(image, Path) and image not in missing and image not in found:
                try:
                    find_image(image)
                    found.add(image)
                except ImageError:
                    missing[image] = sample.question_id
    if missing:
        examples = ", ".join(
            f"{path} (question {question!r})" for path, question in list(missing.items())[:3]
        )
        raise ImageError(f"{len(missing)} picture(s) that the questions need are missing, such as {examples}")


def fingerprint(value: Any) -> str:
    """Sixteen digits that change with a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_fingerprint(model: Any) -> str:
    """Changes with the weights: from every tensor its name, shape and some hundred values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
