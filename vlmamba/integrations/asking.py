"""A checkpoint that answers chat messages, in batches: what other harnesses and the server need of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlmamba.common.load import load_model
from vlmamba.evaluation.generation import (
    Question,
    encode_question,
    generate_answers,
    open_pictures,
    sample_answers,
)
from vlmamba.evaluation.likelihood import OptionScore, encode_options, score_options
from vlmamba.evaluation.runner import BatchSize, group_by_pictures, out_of_memory_is_none
from vlmamba.evaluation.task import ImageRef, Sample

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request:
    """A conversation that waits for its next answer.

    Attributes:
        messages: As for `VLMambaProcessor.apply_chat_template`, pictures as ``{"type": "image"}``.
        images: The pictures, in their order.
    """

    messages: Messages
    images: tuple[ImageRef, ...] = ()


class Completion(NamedTuple):
    """One answer and what it cost."""

    text: str
    prompt_tokens: int
    tokens: int
    """New tokens, the end-of-text token included."""
    cut: bool
    """Whether the limit on new tokens ended it."""


@dataclass
class Ending:
    """How an answer that is being written ended: whether the limit on new tokens did it."""

    cut: bool = False


class AnswerStream(Iterator[str]):
    """The pieces of an answer as it is written; closing it, or letting go of it, ends the writing."""

    def __init__(self, pieces: Generator[str, None, None], ending: Ending) -> None:
        self._pieces, self._ending = pieces, ending

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def cut(self) -> bool:
        """At the end: whether the limit on new tokens ended it."""
        return self._ending.cut

    def close(self) -> None:
        """End the writing."""
        self._pieces.close()


def user_message(text: str, images: Sequence[ImageRef]) -> Request:
    """One question: its pictures, each followed by a newline, then the text, taken literally."""
    content: list[dict[str, Any]] = []
    for _ in images:
        content += [{"type": "image"}, {"type": "text", "text": "\n"}]
    return Request([{"role": "user", "content": [*content, {"type": "text", "text": text}]}], tuple(images))


@dataclass
class Answerer:
    """A model that answers requests, the same in every batch.

    Attributes:
        model: In evaluation mode.
        processor: Its own.
        batch_size: Requests at a time.
    """

    model: Any
    processor: Any
    batch_size: BatchSize
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = "auto",
    ) -> Answerer:
        """Load a run or an exported model directory."""
        model, processor = load_model(checkpoint, device=device, dtype=dtype)
        size = int(batch_size) if str(batch_size).isdecimal() else str(batch_size)
        return cls(model, processor, BatchSize(size, model.device.type))

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Answers in the order of the requests.

        Args:
            requests: What to answer.
            max_new_tokens: Longest answer.
            until: An answer ends before the first of these.
            sampling: Options of transformers' `generate` (do_sample, temperature, top_p, num_beams); greedy
                when left out.
        """
        questions = [
            encode_question(self.processor, self._sample(at, r), r.messages) for at, r in enumerate(requests)
        ]

        def answer(batch: Sequence[Question]) -> list[str]:
            if sampling:
                replies = sample_answers(
                    self.model, self.processor, batch, max_new_tokens=max_new_tokens, **sampling
                )
            else:
                replies = generate_answers(self.model, self.processor, batch, max_new_tokens=max_new_tokens)
            return [_until(reply.text, until) for reply in replies]

        return self._in_batches(questions, answer)

    def complete(
        self,
        request: Request,
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> Completion:
        """One answer, with what it cost; arguments as in `generate`."""
        question = encode_question(self.processor, self._sample(0, request), request.messages)
        with self.lock:
            if sampling:
                (reply,) = sample_answers(
                    self.model, self.processor, [question], max_new_tokens=max_new_tokens, **sampling
                )
            else:
                (reply,) = generate_answers(
                    self.model, self.processor, [question], max_new_tokens=max_new_tokens
                )
        text = _until(reply.text, until)
        return Completion(text, len(question.input_ids), reply.tokens, reply.cut and text == reply.text)

    def stream(
        self,
        request: Request,
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> AnswerStream:
        """One answer in pieces, as it is written; arguments as in `generate`.

        Raises:
            ImageError: A picture cannot be read (before the first piece).
        """
        question = encode_question(self.processor, self._sample(0, request), request.messages)
        open_pictures(question.sample)
        ending = Ending()
        return AnswerStream(self._pieces(question, max_new_tokens, until, sampling or {}, ending), ending)

    def _pieces(
        self,
        question: Question,
        max_new_tokens: int,
        until: Sequence[str],
        sampling: Mapping[str, Any],
        ending: Ending,
    ) -> Generator[str, None, None]:
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = threading.Event()
        failure: list[Exception] = []

        def write() -> None:
            try:
                (reply,) = sample_answers(
                    self.model,
                    self.processor,
                    [question],
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, scores, **_: _stop_rows(ids, stopped)],
                    **sampling,
                )
                ending.cut = reply.cut and not stopped.is_set()
            except Exception as error:  # noqa: BLE001 - raised again below, in the thread that asked
                failure.append(error)
                streamer.end()

        found = False
        with self.lock:
            thread = threading.Thread(target=write, daemon=True)
            thread.start()
            try:
                found = yield from hold_back(_all_of(streamer, thread), until)
            finally:
                stopped.set()
                thread.join()
        if failure:
            raise failure[0]
        if found:  # the model may have written to its limit before it was told
            ending.cut = False

    def score(self, requests: Sequence[Request], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """How likely each of its options is as the answer to a request."""
        questions = [
            encode_options(self.processor, self._sample(at, r), r.messages, choices)
            for at, (r, choices) in enumerate(zip(requests, options, strict=True))
        ]
        return self._in_batches(questions, lambda batch: score_options(self.model, self.processor, batch))

    def _sample(self, at: int, request: Request) -> Sample:
        return Sample(at, request.images, "")

    def _in_batches(
        self, questions: Sequence[Question], answer: Callable[[Sequence[Question]], list[Any]]
    ) -> list[Any]:
        """The answers in order, computed with questions about the same pictures together."""
        by_id = {question.sample.question_id: question for question in questions}
        order = [
            by_id[sample.question_id]
            for group in group_by_pictures([question.sample for question in questions])
            for sample in group
        ]
        answers: dict[Any, Any] = {}
        with self.lock:
            while order:
                batch = order[: self.batch_size.now]
                given = out_of_memory_is_none(functools.partial(answer, batch), self.model.device.type)
                if given is None:
                    self.batch_size.shrink(len(batch))
                    continue
                answers |= {q.sample.question_id: a for q, a in zip(batch, given, strict=True)}
                order = order[len(batch) :]
        return [answers[at] for at in range(len(questions))]


def _all_of(streamer: Iterator[str], thread: threading.Thread) -> Iterator[str]:
    """The pieces; at their end the thread has ended too, by itself."""
    yield from streamer
    thread.join()


def _stop_rows(ids: Any, stopped: threading.Event) -> Any:
    import torch

    return torch.full((ids.shape[0],), stopped.is_set(), device=ids.device)


def _until(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text


def hold_back(pieces: Iterator[str], until: Sequence[str]) -> Generator[str, None, bool]:
    """Pass text on up to the first of some strings, keeping back what may be the beginning of one.

    Returns:
        Whether one of them came.
    """
    until = [stop for stop in until if stop]
    longest = max((len(stop) for stop in until), default=1)
    text, sent = "", 0
    for piece in pieces:
        text += piece
        ends = [at for stop in until if (at := text.find(stop)) >= 0]
        if ends:
            if text[sent : min(ends)]:
                yield text[sent : min(ends)]
            return True
        ready = len(text) - longest + 1
        if ready > sent:
            yield text[sent:ready]
            sent = ready
    if text[sent:]:
        yield text[sent:]
    return False
