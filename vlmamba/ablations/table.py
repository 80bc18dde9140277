"""What a table is: rows, what they share, what they are measured by, and what a paper says."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmamba.config.files import find_file, load_python_file
from vlmamba.errors import ConfigError
from vlmamba.evaluation.switches import SWITCHES
from vlmamba.registry import close_matches

FOLDER = "eval/ablations"
OFFICIAL = ("vqav2_val", "gqa", "scienceqa_img", "textvqa", "pope", "mme", "mmbench", "vizwiz_val")
"""The papers' benchmarks, those with public answers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        name: In the table.
        settings: Arguments of the recipe's functions (``connector``) and dotted keys of the config, for every
            stage.
        stages: More of them for one stage: ``{"finetune": {"optim.lr": 1e-4}}``.
        parts: Parts of the connector that start from the last stage of another row of the same seed:
            ``{"pre": "VL-Mamba"}``.
        switches: Changes of the trained model before it is measured (`vlmamba.evaluation.switches`):
            ``{"scan": "forward"}``, ``{"num_queries": 16}``. Rows that differ in nothing else share their training.
        recipe: Another recipe than the table's; ``cobra:finetune`` is that stage alone.
        paper: The paper's own figures, by the names of its columns.
        shown: Whether it is a line of the table, or only trained because another row starts from it.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    switches: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    shown: bool = True


@dataclass(frozen=True, kw_only=True)
class Table:
    """A comparison.

    Attributes:
        title: Its heading.
        recipe: File in ``train/`` whose stages every row runs.
        rows: In their order.
        columns: What is measured: tasks, or kinds of their questions (``playground/digit``, ``playground/*`` for
            all); the first is the one that plots show.
        baseline: Row that the others are compared with; the first one shown when left out.
        settings: Of all rows, under their own.
        stages: Of all rows, for one stage.
        seeds: Each row is trained once with each.
        source: Where the paper's figures come from.
        question: What the table asks, in a sentence.
        folder: Where tasks given by name live.
    """

    title: str
    recipe: str
    rows: Sequence[Row]
    columns: Sequence[str]
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (1, 2, 3)
    source: str = ""
    question: str = ""
    folder: str = "eval"

    def __post_init__(self) -> None:
        """Check that names are unique and are there where they are referred to."""
        names = [row.name for row in self.rows]
        double = [name for name, count in Counter(names).items() if count > 1]
        if double:
            raise ConfigError(f"table {self.title!r} has two rows called {double[0]!r}")
        if not self.shown:
            raise ConfigError(f"table {self.title!r} has no row to show")
        if not self.columns:
            raise ConfigError(f"table {self.title!r} measures nothing: name at least one task in columns")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"table {self.title!r}: seeds must be different numbers, got {list(self.seeds)}"
            )
        for row in self.rows:
            for part, other in row.parts.items():
                self._require(other, f"part {part!r} of row {row.name!r}")
            for switch in row.switches:
                if switch not in SWITCHES:
                    raise ConfigError(
                        f"row {row.name!r}: unknown switch {switch!r}.{close_matches(switch, list(SWITCHES))} "
                        f"There are: {', '.join(SWITCHES)}."
                    )
        if self.baseline is not None:
            self._require(self.baseline, "the baseline")

    def _require(self, name: str, what: str) -> None:
        names = [row.name for row in self.rows]
        if name not in names:
            raise ConfigError(
                f"table {self.title!r}: {what} is {name!r}, which is no row.{close_matches(name, names)} Rows: "
                f"{', '.join(names)}."
            )

    @property
    def shown(self) -> list[Row]:
        """The lines of the table."""
        return [row for row in self.rows if row.shown]

    @property
    def compared_with(self) -> str:
        """Name of the row that the others are compared with."""
        return self.baseline if self.baseline is not None else self.shown[0].name

    def named(self, texts: Sequence[str]) -> list[str]:
        """Names of rows in lists of them, separated by commas or semicolons; a name may hold commas itself.

        What is no row stays as it is, for `vlmamba.ablations.graph.expand` to complain about.
        """
        names = {row.name for row in self.rows}
        found: list[str] = []
        for text in (part for each in texts for part in ([each] if each in names else each.split(";"))):
            words = [word.strip() for word in text.split(",")]
            while words:
                ends = [end for end in range(len(words), 0, -1) if ", ".join(words[:end]) in names]
                end = ends[0] if ends else 1
                found.append(", ".join(words[:end]))
                words = words[end:]
        return found

    @property
    def tasks(self) -> list[str]:
        """The tasks that its columns need."""
        return list(dict.fromkeys(column.partition("/")[0] for column in self.columns))

    @property
    def paper_columns(self) -> list[str]:
        """Names of the paper's columns, as they first come."""
        return list(dict.fromkeys(name for row in self.rows for name in row.paper))


def load_table(spec: str, recipe: str | None = None, *, folder: str | Path = FOLDER) -> Table:
    """Make a table from its file.

    Args:
        spec: A name in `folder`, or the path of a file.
        recipe: The recipe that it is asked to compare under; its own default when left out.
        folder: Where tables given by name live.

    Raises:
        ConfigError: There is no such table, or it has no rows for this recipe.
        MissingFileError: A path was given and there is no such file.
    """
    path = find_file(spec, folder, "table", "my/table.py")
    function = getattr(load_python_file(path, "ablation"), "table", None)
    if not inspect.isfunction(function):
        raise ConfigError(f"{path} defines no function table(recipe), hence no table")
    table = function() if recipe is None else function(recipe)
    if not isinstance(table, Table):
        raise ConfigError(f"{path}:table returned {type(table).__name__}, not a vlmamba.ablations.Table")
    return table
