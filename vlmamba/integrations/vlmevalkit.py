"""vlmamba in VLMEvalKit, unmodified.

VLMEvalKit looks models up in a dictionary, so a launcher puts ours there and then runs its ``run.py``:

    python -m vlmamba.integrations.vlmevalkit path/to/run.py --checkpoint runs/NAME -- --data MME POPE

It works under torchrun too, since every process runs the launcher. Multiple choice and yes/no questions get LLaVA-1.5's
prompts (VLMEvalKit's own have no instruction to answer with a letter or a word); all others VLMEvalKit's.
"""

from __future__ import annotations

import argparse
import functools
import runpy
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError, require
from vlmamba.evaluation.layouts import LETTER, LETTER_CN, multiple_choice, with_suffix

SHORT_ANSWER = 128
LONG_ANSWER = 1024
"""Tokens: LLaVA-1.5's limits for short answers, and for multiple choice and free text."""
FEATURE = "the VLMEvalKit plug-in"


@functools.cache
def model_class() -> type:
    """`VLMamba`, a subclass of VLMEvalKit's ``BaseModel``.

    Raises:
        MissingDependencyError: VLMEvalKit is not installed.
    """
    base = require("vlmeval.vlm.base", extra=None, feature=FEATURE).BaseModel
    return type(
        "VLMamba", (_Plugin, base), {"INTERLEAVE": True, "INSTALL_REQ": False, "__module__": __name__}
    )


class _Plugin:
    """What VLMEvalKit asks of a model.

    Args:
        checkpoint: A run or an exported model directory.
        device: See `vlmamba.evaluation.cli.evaluate_checkpoint`.
        dtype: Likewise.
        max_new_tokens: Longest answer; LLaVA-1.5's limits when left out.
    """

    def __init__(
        self, checkpoint: str, device: str = "auto", dtype: str = "auto", max_new_tokens: int | None = None
    ) -> None:
        from vlmamba.integrations.asking import Answerer

        super().__init__()
        self.answerer = Answerer.load(checkpoint, device=device, dtype=dtype, batch_size=1)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to a message: a list of ``{"type": "image" | "text", "value": path | text}``."""
        answers: list[str] = self.answerer.generate(
            [read_message(message)], max_new_tokens=self._limit(dataset)
        )
        return answers[0]

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether `build_prompt` makes the prompts of a data set."""
        return _kind(dataset) in ("MCQ", "Y/N")

    def build_prompt(self, line: Mapping[str, Any], dataset: str | None = None) -> list[dict[str, str]]:
        """LLaVA-1.5's prompt for a row of a multiple-choice or yes/no data set."""
        paths = self.dump_image(line, dataset)  # type: ignore[attr-defined]
        text = prompt_text(line, _kind(dataset), chinese="_CN" in str(dataset))
        images = [paths] if isinstance(paths, str) else list(paths)
        return [*({"type": "image", "value": str(path)} for path in images), {"type": "text", "value": text}]

    def _limit(self, dataset: str | None) -> int:
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        short = _kind(dataset) in ("Y/N", "VQA") and dataset != "MMVet"
        return SHORT_ANSWER if short else LONG_ANSWER


def prompt_text(line: Mapping[str, Any], kind: str, *, chinese: bool = False) -> str:
    """LLaVA-1.5's text: hint, question, options (rows of absent ones are missing or not text), instruction."""
    if kind == "Y/N":
        return with_suffix(str(line["question"]))
    hint = line.get("hint")
    given = {letter: line.get(letter) for letter in string.ascii_uppercase}
    options = {letter: str(text) for letter, text in given.items() if text is not None and text == text}
    return multiple_choice(
        str(line["question"]),
        options,
        hint=hint if isinstance(hint, str) else "",
        suffix=LETTER_CN if chinese else LETTER,
    )


def read_message(message: Sequence[Mapping[str, str]]) -> Any:
    """A request from VLMEvalKit's message; text behind a picture begins on a new line, as in training.

    Raises:
        DataError: There is something else than pictures and text.
    """
    from vlmamba.integrations.asking import Request

    for part in message:
        if part["type"] not in ("image", "text"):
            raise DataError(f"vlmamba reads pictures and text, this message holds {part['type']!r}")
    parts = [Path(part["value"]) if part["type"] == "image" else part["value"] for part in message]
    return Request.of([("user", parts)])


def _kind(dataset: str | None) -> str:
    """VLMEvalKit's type of a data set: MCQ, Y/N, VQA, ..."""
    if dataset is None:
        return ""
    return str(require("vlmeval.dataset", extra=None, feature=FEATURE).DATASET_TYPE(dataset))


def register(name: str, checkpoint: str, **options: Any) -> None:
    """Put a checkpoint among VLMEvalKit's models, under a name of ours."""
    config = require("vlmeval.config", extra=None, feature=FEATURE)
    models = require("vlmeval.vlm", extra=None, feature=FEATURE)
    made = model_class()
    setattr(models, "VLMamba", made)  # noqa: B010 - a module of another package
    config.supported_VLM[name] = functools.partial(made, checkpoint=checkpoint, **options)


def main(words: Sequence[str] | None = None) -> int:
    """Register a checkpoint and run VLMEvalKit's ``run.py`` with the words after ``--``.

    Raises:
        MissingFileError: There is no such ``run.py``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlmamba.integrations.vlmevalkit",
        description="Run VLMEvalKit with a vlmamba checkpoint. What follows -- goes to its run.py; --model is added "
        "when it is not there.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="VLMEvalKit's run.py")
    parser.add_argument(
        "--checkpoint", required=True, help="a run (runs/NAME) or an exported model directory"
    )
    parser.add_argument("--name", default="vlmamba", help="what to call the model (default: vlmamba)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    given = list(sys.argv[1:] if words is None else words)
    own, theirs = (
        (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    )
    arguments = parser.parse_args(own)
    if not Path(arguments.run).is_file():
        raise MissingFileError(f"there is no {arguments.run}: give the run.py of a clone of VLMEvalKit")
    register(arguments.name, arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    if "--model" not in theirs:
        theirs = [*theirs, "--model", arguments.name]
    before = sys.argv
    sys.argv = [arguments.run, *theirs]
    try:
        runpy.run_path(arguments.run, run_name="__main__")
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
