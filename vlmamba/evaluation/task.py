"""Tasks: samples, a prompt and a scorer. One Python file a benchmark, loaded by path.

``eval/textvqa.py`` defines ``task(annotations=..., images=...) -> Task`` and is asked for as ``textvqa``. Its
variants are further such functions whose names begin with the file's, as ``textvqa_ocr``, and are asked for by
these names; any public function of a file can be asked for as ``path/to/file.py:function``.
Nothing here imports torch: tasks are read and answers scored without a model.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from vlmamba.common.vocabulary import IMAGE_TOKEN, ImageRef, StoredImage
from vlmamba.config.files import find_file, is_path, load_python_file, names_in, unknown_name
from vlmamba.errors import ConfigError, DataError
from vlmamba.evaluation.records import Record
from vlmamba.evaluation.scorers import Score, exact_match
from vlmamba.registry import admit, close_matches, outside

FOLDER = "eval"
"""Where tasks given by name live, under the current directory."""


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
        options: The candidate answers of a likelihood task, in order.
        group: Questions with the same group are scored together (the rotations of a question of MMBench, the
            two questions on a picture of MME); None: alone.
    """

    question_id: str | int
    images: tuple[ImageRef, ...]
    text: str
    answer: Any = None
    category: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    group: Hashable = None

    @property
    def key(self) -> tuple[str, str]:
        """What an answer is filed under: ids alone are not unique in every benchmark."""
        return str(self.question_id), self.text


class Reference(NamedTuple):
    """A published figure, in the unit of the task's headline."""

    model: str
    value: float
    source: str


Prompt = Callable[[Sample], list[dict[str, Any]]]
Scorer = Callable[[Sequence[Sample], Sequence[Any]], Score]
Submission = Callable[[Sequence[Sample], Sequence[Any], Path], Path]
Reader = Callable[[Path, Sequence[Sample]], list[Record] | None]


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
        score: From samples and what `reads` says of each answer (None: not answered) to a `Score`. Where
            only a server knows the answers, `Score.correct` is empty and the headline's value None.
        max_new_tokens: Longest answer.
        description: One sentence for reports.
        method: "generate": the answer is written by greedy decoding. "likelihood": it is that of
            `Sample.options` with the largest log-probability after the prompt; its record has all of them in
            ``metadata["scores"]``, in the order of the options.
        normalised: Likelihood: the mean log-probability of a token instead of the sum.
        reads: What `score` and `submission` are given of an answer: its "text", or the whole "record", for
            scorers that want its ``metadata``.
        submission: Writes the file that the benchmark's server wants and returns its path.
        submission_suffix: Of that file's name; empty for a folder.
        reader: Reads answers in the benchmark's own layouts; returns None for a file of another layout, which
            is then read as LLaVA's JSON lines.
        references: Published figures to show beside ours.
        headline: The one figure to show where the scorer's metrics name none (``metrics["headline"]``): a
            dotted path to a share in the metrics.
        settings: What else a reader of the figure must know (variant of the prompt, release, split).

    Raises:
        DataError: There is no question, or two have the same id and text, or a likelihood task lacks options.
    """

    name: str
    samples: Sequence[Sample]
    prompt: Prompt = image_first
    score: Scorer = score_exact_match
    max_new_tokens: int = 128
    description: str = ""
    method: Literal["generate", "likelihood"] = "generate"
    normalised: bool = False
    reads: Literal["text", "record"] = "text"
    submission: Submission | None = None
    submission_suffix: str = ".json"
    reader: Reader | None = None
    references: tuple[Reference, ...] = ()
    headline: str = "overall.accuracy"
    settings: Mapping[str, Any] = field(default_factory=dict)

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
        few = (
            [s.question_id for s in self.samples if len(s.options) < 2] if self.method == "likelihood" else []
        )
        if few:
            raise DataError(
                f"task {self.name!r} is scored by likelihood, but {len(few)} question(s) have fewer than two "
                f"options, such as {few[0]!r}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a question, expected answer, category or picture's name does."""
        digest = hashlib.sha256()
        for s in self.samples:
            names = [i.name if isinstance(i, Path | StoredImage) else "" for i in s.images]
            row = [s.question_id, names, s.text, s.answer, s.category, *s.options]
            digest.update(json.dumps(row, default=str).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()[:16]


def first_questions(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """The first so many questions, and those of the others that are scored together with one of them."""
    if limit is None or limit >= len(samples):
        return list(samples)
    groups = {s.group for s in samples[:limit] if s.group is not None}
    return [s for at, s in enumerate(samples) if at < limit or s.group in groups]


def load_task(spec: str, *, folder: str | Path = FOLDER, **options: Any) -> Task:
    """Make a task from its file.

    Args:
        spec: A name or a path to a file. The name of a file in `folder` means its function ``task``; that of
            a variant (``textvqa_ocr``) the function of this name in the file it begins with (``textvqa.py``).
            ``:function`` after a name or path means this function. Or ``package.module:function`` of your own,
            annotated to return a `Task`.
        folder: Where tasks given by name live, under the current directory.
        **options: Passed to the function; those that are None are left to its defaults.

    Raises:
        ConfigError: There is no such task, function or option; the message lists what there is.
        MissingFileError: A path was given and there is no such file.
    """
    path: Path | str
    found, function_name = _located(spec, Path(folder))
    if found is None:
        path, function = spec.rpartition(":")[0], outside(spec, "task", Task)
    else:
        path = found
        admit(str(path))
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


def task_file(spec: str, folder: str | Path = FOLDER) -> Path | None:
    """The file that a task's name means (see `load_task`); None for one in a module."""
    return _located(spec, Path(folder))[0]


def _located(spec: str, folder: Path) -> tuple[Path | None, str]:
    """File and function of a task; no file where it is in a module."""
    name, _, function = spec.rpartition(":") if ":" in spec else (spec, "", "")
    if function and not is_path(name) and name not in task_names(folder) and _is_module(name):
        return None, function
    path, default = _resolve(name, folder)
    return path, function or default


def task_names(folder: str | Path = FOLDER) -> list[str]:
    """Names of the tasks in a folder, variants after the file they are in. No file is run for this."""
    return [name for file in names_in(folder) for name in (file, *_variants(Path(folder) / f"{file}.py"))]


def _variants(path: Path) -> list[str]:
    """Public functions of a task file whose names begin with the file's."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        return []
    return [
        n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith(f"{path.stem}_")
    ]


def _is_module(name: str) -> bool:
    return "." in name or importlib.util.find_spec(name) is not None


def _resolve(name: str, folder: Path) -> tuple[Path, str]:
    """File and function of a task's name."""
    files = names_in(folder)
    if is_path(name) or name in files:
        return find_file(name, folder, "task", "my/benchmark.py"), "task"
    for file in sorted(files, key=len, reverse=True):
        if name.startswith(f"{file}_") and name in _variants(folder / f"{file}.py"):
            return folder / f"{file}.py", name
    raise unknown_name(name, task_names(folder), folder, "task", "my/benchmark.py")


def _task_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
