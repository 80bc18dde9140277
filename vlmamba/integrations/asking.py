"""A checkpoint that answers chat messages, in batches: what other harnesses and the server need of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmamba.common.load import load_model
from vlmamba.common.vocabulary import Message
from vlmamba.evaluation.generation import Question, encode_question, end_ids, generate_answers, sample_answers
from vlmamba.evaluation.likelihood import OptionScore, encode_options, score_options
from vlmamba.evaluation.runner import BatchSize, group_by_pictures, out_of_memory_is_none
from vlmamba.evaluation.task import ImageRef, Sample


class Request(NamedTuple):
    """A conversation that waits for its next answer.

    Attributes:
        messages: As for `VLMambaProcessor.apply_chat_template`, pictures as ``{"type": "image"}``.
        images: The pictures, in their order.
    """

    messages: Sequence[Message]
    images: tuple[ImageRef, ...] = ()

    @classmethod
    def of(cls, turns: Iterable[tuple[str, Iterable[str | ImageRef]]]) -> Request:
        """From turns of a role and its parts: text, taken literally, or a picture, which a newline follows."""
        messages: list[Message] = []
        images: list[ImageRef] = []
        for role, parts in turns:
            content: list[dict[str, str]] = []
            for part in parts:
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                else:
                    images.append(part)
                    content += [{"type": "image"}, {"type": "text", "text": "\n"}]
            messages.append({"role": role, "content": content})
        return cls(messages, tuple(images))


class Completion(NamedTuple):
    """One answer and what it cost."""

    text: str
    prompt_tokens: int
    tokens: int
    """New tokens, the end-of-text token included."""
    cut: bool
    """Whether the limit on new tokens ended it."""


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
        questions = [self.encode(request, at) for at, request in enumerate(requests)]

        def answer(batch: Sequence[Question]) -> list[str]:
            if sampling:
                replies = sample_answers(
                    self.model, self.processor, batch, max_new_tokens=max_new_tokens, **sampling
                )
            else:
                replies = generate_answers(self.model, self.processor, batch, max_new_tokens=max_new_tokens)
            return [_until(reply.text, until) for reply in replies]

        return self._in_batches(questions, answer)

    def encode(self, request: Request, at: int = 0) -> Question:
        """The ids of a request, up to where its answer begins.

        Raises:
            DataError: The chat template refuses the conversation, or it has another number of pictures than places.
        """
        return encode_question(self.processor, Sample(at, request.images, ""), request.messages)

    def write(
        self,
        question: Question,
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
        seed: int | None = None,
        on_text: Callable[[str], object] = lambda piece: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Completion:
        """Write one answer; further arguments as in `generate`.

        Args:
            question: Of `encode`.
            max_new_tokens: Longest answer.
            until: The answer ends before the first of these.
            sampling: Options of transformers' `generate`.
            seed: Of the sampling.
            on_text: Called with every piece of text as it is written; together they are the answer.
            stop: Asked after every token whether to write on.

        Raises:
            ImageError: A picture cannot be read (before the first piece).
        """
        writer = _Writer(self.processor.tokenizer, end_ids(self.model, self.processor), until, on_text)
        if seed is not None:
            torch.manual_seed(seed)
        (reply,) = sample_answers(
            self.model,
            self.processor,
            [question],
            max_new_tokens=max_new_tokens,
            streamer=writer,
            stopping_criteria=[lambda ids, scores, **_: writer.stop_rows(ids, stop)],
            **sampling or {},
        )
        return Completion(writer.sent, len(question.input_ids), reply.tokens, reply.cut and not writer.found)

    def score(self, requests: Sequence[Request], options: Sequence[Sequence[str]]) -> list[list[OptionScore]]:
        """How likely each of its options is as the answer to a request."""
        questions = [
            encode_options(self.processor, Sample(at, r.images, ""), r.messages, choices)
            for at, (r, choices) in enumerate(zip(requests, options, strict=True))
        ]
        return self._in_batches(questions, lambda batch: score_options(self.model, self.processor, batch))

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
        while order:
            batch = order[: self.batch_size.now]
            given = out_of_memory_is_none(functools.partial(answer, batch), self.model.device.type)
            if given is None:
                self.batch_size.shrink(len(batch))
                continue
            answers |= {q.sample.question_id: a for q, a in zip(batch, given, strict=True)}
            order = order[len(batch) :]
        return [answers[at] for at in range(len(questions))]


class _Writer:
    """A streamer of transformers' `generate` that passes on what no later token can change.

    Together the pieces are the text without white space at its ends, cut before the first of some strings.

    Args:
        tokenizer: The model's.
        ends: Ids of tokens that end an answer, and are no part of it.
        until: The strings.
        on_text: Called with every piece.

    Attributes:
        sent: The text so far.
        found: Whether one of the strings came.
    """

    def __init__(
        self, tokenizer: Any, ends: Sequence[int], until: Sequence[str], on_text: Callable[[str], object]
    ) -> None:
        self.tokenizer, self.ends, self.on_text = tokenizer, ends, on_text
        self.until = [stop for stop in until if stop]
        self.kept = max((len(stop) for stop in self.until), default=1) - 1
        self.ids: list[int] | None = None
        self.sent, self.found = "", False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then one token after another."""
        if self.ids is None:
            self.ids = []
        elif not self.found:
            self.ids += [token for token in value.reshape(-1).tolist() if token not in self.ends]
            text = self._text()
            if (
                not self.found
            ):  # keep back half a character, and what may be the beginning of one of the strings
                text = text.rstrip("\ufffd")
                text = text[: len(text) - self.kept]
            self._send(text.rstrip())

    def end(self) -> None:
        """Pass on the rest."""
        self._send(self._text().rstrip())

    def stop_rows(self, ids: Tensor, stop: Callable[[], bool]) -> Tensor:
        """For transformers: whether each row (there is one) is to end."""
        return torch.full((len(ids),), self.found or stop(), device=ids.device)

    def _text(self) -> str:
        text = self.tokenizer.decode(self.ids or [], skip_special_tokens=True).lstrip()
        ends = [at for word in self.until if (at := text.find(word)) >= 0]
        self.found = bool(ends)
        return text[: min(ends)] if ends else text

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent):
            self.on_text(text[len(self.sent) :])
            self.sent = text


def _until(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    ends = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text
