"""vlmamba in lmms-eval (0.7 and later), unmodified: ``lmms-eval --model vlmamba --model_args pretrained=runs/NAME``.

lmms-eval finds `manifests` through the entry point group ``lmms_eval.models`` (its registry_v2.py). The two classes are
made when lmms-eval asks for them, since their base class is lmms-eval's: `VLMambaChat` for tasks that give messages,
`VLMambaSimple` for the others and for everything scored by likelihood, which lmms-eval does not run with chat models.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from vlmamba.errors import ConfigError, DataError, require

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024
"""Where a task names no limit; lmms-eval's LLaVA uses the same."""
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams")


def manifests() -> Any:
    """What lmms-eval registers; imports nothing heavy."""
    registry = require("lmms_eval.models.registry_v2", extra="lmms-eval", feature="the lmms-eval plug-in")
    return registry.ModelManifest(
        model_id="vlmamba",
        simple_class_path=f"{__name__}.VLMambaSimple",
        chat_class_path=f"{__name__}.VLMambaChat",
    )


def __getattr__(name: str) -> Any:
    """The classes, made on first use."""
    if name in ("VLMambaSimple", "VLMambaChat"):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _classes() -> dict[str, type]:
    base = require("lmms_eval.api.model", extra="lmms-eval", feature="the lmms-eval plug-in").lmms
    simple = type(
        "VLMambaSimple",
        (_Plugin, base),
        {"is_simple": True, "__doc__": "Simple model.", "_read": _read_simple},
    )
    chat = type(
        "VLMambaChat", (_Plugin, base), {"is_simple": False, "__doc__": "Chat model.", "_read": _read_chat}
    )
    for made in (simple, chat):
        made.__module__ = __name__
    return {"VLMambaSimple": simple, "VLMambaChat": chat}


@functools.cache
def _pair_class() -> Any:
    """What a (loss, greedy) pair must be.

    lmms-eval 0.7.3 turns every pair that is not one of its `GenerationResult`s into text before its multiple-choice
    tasks read it (`unwrap_generation_output`); other versions take a plain tuple. This is both.
    """
    instance = require("lmms_eval.api.instance", extra="lmms-eval", feature="the lmms-eval plug-in")
    result = getattr(instance, "GenerationResult", None)
    if result is None:
        return tuple
    members = {"__init__": lambda self, pair: None, "text": property(tuple), "token_counts": None}
    return type("ScoredOption", (tuple, result), members)


class _Plugin:
    """What lmms-eval asks of a model.

    Args:
        pretrained: A run or an exported model directory.
        batch_size: A number or "auto".
        device: "auto", or torch's name.
        dtype: See `vlmamba.evaluation.cli.evaluate_checkpoint`.
        max_batch_size: Ignored: "auto" finds what fits.
        **unknown: Warned about.
    """

    task_dict: Mapping[str, Any]
    cache_hook: Any
    _read: ClassVar[Callable[..., tuple[Any, Mapping[str, Any]]]]

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = "auto",
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | str | None = None,
        **unknown: Any,
    ) -> None:
        from vlmamba.integrations.asking import Answerer

        super().__init__()
        if not pretrained:
            raise ConfigError(
                "name the checkpoint: --model_args pretrained=runs/NAME (a run or an exported model)"
            )
        if unknown:
            log.warning("vlmamba in lmms-eval does not know the model_args %s", ", ".join(sorted(unknown)))
        self._answerer: Answerer | None = Answerer.load(
            pretrained, device=device or "auto", dtype=dtype, batch_size=batch_size
        )

    @property
    def answerer(self) -> Any:
        """The checkpoint."""
        if self._answerer is None:
            raise ConfigError("lmms-eval has cleaned this model away; make a new one")
        return self._answerer

    @property
    def device(self) -> Any:
        """Where the model computes; lmms-eval gathers there."""
        return self.answerer.model.device

    def clean(self) -> None:
        """Let go of the model."""
        self._answerer = None
        super().clean()  # type: ignore[misc]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; those with the same settings are asked together."""
        read = [self._read(request.args) for request in requests]
        answers: list[str] = [""] * len(requests)
        alike: dict[Any, list[int]] = {}
        for at, (_, settings) in enumerate(read):
            alike.setdefault(repr(sorted(_settings(settings).items())), []).append(at)
        for places in alike.values():
            settings = _settings(read[places[0]][1])
            given = self.answerer.generate([read[at][0] for at in places], **settings)
            for at, answer in zip(places, given, strict=True):
                answers[at] = answer
                request = requests[at]
                self.cache_hook.add_partial("generate_until", (request.args[0], dict(read[at][1])), answer)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(mean loss of a token, whether greedy), lower is better: lmms-eval's tasks choose the smallest.

        Requests on the same document are options of one question and share its prompt.
        """
        from vlmamba.integrations.asking import Request

        groups: dict[Any, list[tuple[int, str]]] = {}
        prompts: dict[Any, Any] = {}
        for at, request in enumerate(requests):
            context, target, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            option = target if isinstance(target, str) else target(document)
            key = (task, split, doc_id, context)
            if key not in prompts:
                prompts[key] = Request.of([("user", [*_pictures(doc_to_visual(document)), context])])
            groups.setdefault(key, []).append((at, str(option).strip()))
        scored = self.answerer.score(
            [prompts[k] for k in groups], [[o for _, o in g] for g in groups.values()]
        )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pair = _pair_class()
        for group, scores in zip(groups.values(), scored, strict=True):
            for (at, _), score in zip(group, scores, strict=True):
                results[at] = pair((-score.mean, score.greedy))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("vlmamba in lmms-eval answers single rounds only; this task asks several rounds")


def _read_simple(self: Any, arguments: tuple[Any, ...]) -> tuple[Any, Mapping[str, Any]]:
    """Request and settings of a simple task's arguments."""
    from vlmamba.integrations.asking import Request

    context, settings, doc_to_visual, doc_id, task, split = arguments
    pictures = _pictures(doc_to_visual(self.task_dict[task][split][doc_id]))
    return Request.of([("user", [*pictures, context])]), settings


def _read_chat(self: Any, arguments: tuple[Any, ...]) -> tuple[Any, Mapping[str, Any]]:
    """Request and settings of a chat task's arguments."""
    _, doc_to_messages, settings, doc_id, task, split = arguments
    return read_messages(
        doc_to_messages(self.task_dict[task][split][doc_id]), f"{task}/{split}/{doc_id}"
    ), settings


def read_messages(messages: Iterable[Mapping[str, Any]], where: str) -> Any:
    """A request from messages whose content is a list of ``{"type": "image", "url": picture}`` and texts.

    Text behind a picture begins on a new line, as in training.

    Raises:
        DataError: There is something else than pictures and text.
    """
    from vlmamba.integrations.asking import Request

    turns = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] not in ("image", "text"):
                raise DataError(
                    f"{where}: vlmamba reads pictures and text, this message holds {part['type']!r}"
                )
            parts.append(part["url"] if part["type"] == "image" else part["text"])
        turns.append((message["role"], parts))
    return Request.of(turns)


def _pictures(visuals: Any) -> list[Any]:
    """lmms-eval gives a list of pictures, or None."""
    return [picture for picture in (visuals or []) if picture is not None]


def _settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation settings as ours; sampling only where it was asked for."""
    until = kwargs.get("until") or ()
    sampling = {key: kwargs[key] for key in SAMPLING if kwargs.get(key) is not None}
    drawn = (
        bool(sampling.get("do_sample", (sampling.get("temperature") or 0) > 0))
        and sampling.get("temperature") != 0
    )
    if not drawn:
        for key in ("temperature", "top_p", "top_k"):
            sampling.pop(key, None)
    sampling["do_sample"] = drawn
    greedy = not drawn and sampling.get("num_beams", 1) == 1
    return {
        "max_new_tokens": int(kwargs.get("max_new_tokens") or MAX_NEW_TOKENS),
        "until": [until] if isinstance(until, str) else list(until),
        "sampling": None if greedy else sampling,
    }
