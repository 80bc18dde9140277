"""Tasks: samples, a prompt and a scorer. One Python file a benchmark, loaded by path.

``eval/playground.py`` defines ``task(annotations=..., images=...) -> Task`` and is asked for as
``playground``; a file that offers variants has further such functions, asked for as ``name:function``.
Nothing here imports torch: tasks are read and answers scored without a model.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Union

from vlmamba.config import list_recipes, load_python_file
from vlmamba.errors import ConfigError, DataError, MissingFileError
from vlmamba.evaluation.scorers import Score, exact_match
from vlmamba.registry import close_matches

if TYPE_CHECKING:
    from PIL import Image

ImageRef = Union[Path, bytes, "Image.Image"]
"""A picture as a task names it: a file, the bytes of a file, or a picture already open."""
IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        question_id: Its id in the benchmark; unique together with `text`.
        images: Its pictures, none for a text-only question.
        text: The question with every instruction that belongs to it. Pictures come first unless ``<image>``
            stands in the text once for each.
        answer: What the scorer compares with: a text, or several accepted ones.
        category: Kind of question.
        metadata: What the scorer needs besides.
    """

    question_id: str | int
    images: tuple[ImageRef, ...]
    text: str
    answer: Any = None
    category: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What an answer is filed under: ids alone are not unique in every benchmark."""
        return str(self.question_id), self.text


Prompt = Callable[[Sample], list[dict[str, Any]]]
Scorer = Callable[[Sequence[Sample], Sequence[str | None]], Score]


def image_first(sample: Sample) -> list[dict[str, Any]]:
    """The messages of a question: its pictures, each followed by a newline, then the text (LLaVA-1.5's
    order).

    Raises:
        DataError: The text has another number of ``<image>`` than the sample has pictures.
    """
    marks, count = sample.text.count(IMAGE_TOKEN) if sample.images else 0, len(sample.images)
    if marks not in (0, count):
        raise DataError(
            f"question {sample.question_id!r} has {count} picture(s) but {marks} {IMAGE_TOKEN} in its text: "
            "mark all of them or none"
        )
    if not count:
        return [{"role": "user", "content": [{"type": "text", "text": sample.text}]}]
    text = sample.text if marks else f"{IMAGE_TOKEN}\n" * count + sample.text
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return [{"role": "user", "content": content}]


def score_exact_match(samples: Sequence[Sample], predictions: Sequence[str | None]) -> Score:
    """`vlmamba.evaluation.scorers.exact_match` over samples."""
    return exact_match(predictions, [s.answer for s in samples], [s.category for s in samples])


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: For files and tables.
        samples: The questions, in their order.
        prompt: From a sample to messages; the chat template and image tokens are the processor's business.
        score: From samples and predictions (None: not answered) to a `Score`.
        max_new_tokens: Longest answer.
        description: One sentence for reports.

    Raises:
        DataError: There is no question, or two have the same id and text.
    """

    name: str
    samples: Sequence[Sample]
    prompt: Prompt = image_first
    score: Scorer = score_exact_match
    max_new_tokens: int = 128
    description: str = ""

    def __post_init__(self) -> None:
        """Check the questions."""
        if not self.samples:
            raise DataError(f"task {self.name!r} has no question")
        double = [key for key, count in Counter(s.key for s in self.samples).items() if count > 1]
        if double:
            examples = ", ".join(repr(key[0]) for key in double[:3])
            raise DataError(
                f"task {self.name!r} asks {len(double)} question(s) more than once (same id and text), such "
                f"as {examples}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a question, expected answer, category or picture's name does."""
        digest = hashlib.sha256()
        for s in self.samples:
            names = [i.name if isinstance(i, Path) else "" for i in s.images]
            row = [s.question_id, names, s.text, s.answer, s.category]
            digest.update(json.dumps(row, default=str).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()[:16]


def load_task(spec: str, *, folder: str | Path = "eval", **options: Any) -> Task:
    """Make a task from its file.

    Args:
        spec: A name (``<folder>/name.py`` under the current directory) or a path to a file, with
            ``:function`` where another than ``task`` is meant.
        folder: Where tasks given by name live.
        **options: Passed to the function; those that are None are left to its defaults.

    Raises:
        ConfigError: There is no such task, function or option; the message lists what there is.
        MissingFileError: A path was given and there is no such file.
    """
    name, _, function_name = spec.rpartition(":") if ":" in spec else (spec, "", "task")
    path = _resolve(name, Path(folder))
    functions = _task_functions(load_python_file(path, "task"))
    if function_name not in functions:
        raise ConfigError(
            f"{path} has no task {function_name!r}.{close_matches(function_name, list(functions))} It "
            f"defines: {', '.join(functions) or 'no public function'}."
        )
    function = functions[function_name]
    known = list(inspect.signature(function).parameters)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{path}:{function_name} has no option {key!r}.{close_matches(key, known)} It takes: "
                f"{', '.join(known) or 'none'}."
            )
    task = function(**given)
    if not isinstance(task, Task):
        raise ConfigError(
            f"{path}:{function_name} returned {type(task).__name__}, not a vlmamba.evaluation.Task."
        )
    return task


def task_names(folder: str | Path = "eval") -> list[str]:
    """Names of the task files in a folder."""
    return list_recipes(folder)


def _resolve(name: str, folder: Path) -> Path:
    path = Path(name)
    if path.suffix == ".py" or len(path.parts) > 1:
        if not path.is_file():
            raise MissingFileError(f"there is no task file {path} (looked in {Path.cwd()}).")
        return path
    found = task_names(folder)
    if name not in found:
        where = f"{folder}/ under {Path.cwd()}"
        listing = f"Found in {where}: {', '.join(found)}." if found else f"There is no task in {where}."
        raise ConfigError(
            f"unknown task {name!r}.{close_matches(name, found)} {listing} A path such as my/benchmark.py "
            "works too."
        )
    return folder / f"{name}.py"


def _task_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
