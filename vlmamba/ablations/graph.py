"""From a table to the runs that it needs, each once.

A node is one command: a stage of training, an evaluation, or a measurement of speed. Its id is a hash of all that its
result depends on: the resolved config without what changes nothing (paths of outputs, logging, workers), the files it
reads, and the ids of the nodes it starts from. Nodes with the same id are the same run, within a table and between
tables; a changed row gets other ids and nothing else does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from vlmamba.ablations.table import Row, Table
from vlmamba.config import FREE, LATER, dump_yaml, flatten, load_recipe, marked, recipe_functions
from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches, users_words
from vlmamba.training.config import TrainConfig

STAGES = ("pretrain", "finetune")
"""Functions of a recipe, in the order in which they run; a recipe may lack one."""
Kind = Literal["train", "eval", "speed"]
SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True)
class Node:
    """One command.

    Attributes:
        id: Of its result.
        label: For people: of the first row that needs it.
        words: After ``vlmamba``.
        needs: Ids of the nodes that must have finished.
        config: Of a stage of training, with its paths in the store.
        exclusive: Nothing else may run beside it, since it measures time.
    """

    id: str
    kind: Kind
    label: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    config: TrainConfig | None = None

    @property
    def exclusive(self) -> bool:
        """Whether it must run alone."""
        return self.kind == "speed"


@dataclass(frozen=True)
class Cell:
    """The nodes of one row and seed.

    Attributes:
        train: One for each stage.
        speed: None but for the first seed.
        commands: The command lines that train the same without the table.
    """

    row: str
    seed: int
    train: tuple[str, ...]
    evaluation: str | None
    speed: str | None
    commands: tuple[str, ...] = ()


@dataclass
class Graph:
    """All nodes of a table, those that others start from first."""

    nodes: dict[str, Node] = field(default_factory=dict)
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)

    def add(self, node: Node) -> str:
        """Add a node unless it is there; returns its id."""
        self.nodes.setdefault(node.id, node)
        return node.id

    def users(self, node_id: str) -> list[Cell]:
        """Rows and seeds that need a node."""
        return [cell for cell in self.cells.values() if node_id in (*cell.train, cell.evaluation, cell.speed)]

    def without_speed(self) -> Graph:
        """The graph without measurements of speed, which want a quiet machine."""
        nodes = {name: node for name, node in self.nodes.items() if node.kind != "speed"}
        cells = {key: dataclasses.replace(cell, speed=None) for key, cell in self.cells.items()}
        return Graph(nodes, cells)

    def waves(self) -> list[list[Node]]:
        """Nodes that can run side by side, in the order of their waves."""
        level: dict[str, int] = {}
        for node in self.nodes.values():
            level[node.id] = 1 + max((level[n] for n in node.needs), default=-1)
        return [[n for n in self.nodes.values() if level[n.id] == at] for at in sorted(set(level.values()))]


def expand(
    table: Table,
    store: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    folder: str | Path = "train",
) -> Graph:
    """The runs of a table.

    Args:
        table: The table.
        store: Folder that results will be in.
        seeds: Instead of the table's.
        rows: Only these (and those they start from).
        folder: Where recipes live.

    Raises:
        ConfigError: A recipe, setting or row is unknown, or rows start from each other in a circle.
    """
    return _Expansion(table, Path(store), tuple(seeds or table.seeds), Path(folder)).run(rows)


@dataclass
class _Expansion:
    table: Table
    store: Path
    seeds: tuple[int, ...]
    folder: Path
    graph: Graph = field(default_factory=Graph)

    def run(self, names: Sequence[str] | None) -> Graph:
        rows = {row.name: row for row in self.table.rows}
        for name in names or ():
            if name not in rows:
                raise ConfigError(
                    f"no row {name!r} in {self.table.title!r}.{close_matches(name, list(rows))} Rows: "
                    f"{'; '.join(rows)}"
                )
        wanted = [row for row in self.table.rows if (row.name in names if names else row.shown)]
        for seed in self.seeds:  # seed by seed: a first picture of the whole table comes early
            for row in wanted:
                self.cell(row, seed, ())
        return self.graph

    def cell(self, row: Row, seed: int, on_the_way: tuple[str, ...]) -> Cell:
        if row.name in on_the_way:
            circle = " -> ".join((*on_the_way, row.name))
            raise ConfigError(f"rows of {self.table.title!r} start from each other in a circle: {circle}")
        known = self.graph.cells.get((row.name, seed))
        if known is not None and (known.evaluation is not None or on_the_way or not row.shown):
            return known
        rows = {each.name: each for each in self.table.rows}
        parts = {
            part: self.cell(rows[other], seed, (*on_the_way, row.name)).train[-1]
            for part, other in row.parts.items()
        }
        train, commands = self.stages(row, seed, parts)
        measured = row.shown and not on_the_way
        evaluation = self.evaluation(row, seed, train[-1]) if measured else None
        speed = self.speed(row, train[-1]) if measured and seed == self.seeds[0] else None
        cell = Cell(row.name, seed, train, evaluation, speed, commands)
        self.graph.cells[row.name, seed] = cell
        return cell

    def stages(
        self, row: Row, seed: int, parts: Mapping[str, str]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Train nodes of a row, and the command lines that do the same without a table."""
        recipe, _, only = (row.recipe or self.table.recipe).partition(":")
        path = self.folder / f"{recipe}.py" if Path(recipe).suffix != ".py" else Path(recipe)
        if not path.is_file():
            raise ConfigError(f"row {row.name!r}: there is no recipe {path}")
        functions = recipe_functions(path)
        if only and only not in functions:
            raise ConfigError(f"row {row.name!r}: {path} has no stage {only!r}")
        written: dict[str, str] = {}
        ids: list[str] = []
        commands: list[str] = []
        for stage in (s for s in STAGES if s in functions and only in ("", s)):
            settings = {
                **self.table.settings, **self.table.stages.get(stage, {}), **row.settings,
                **row.stages.get(stage, {}), "seed": seed,
            }  # fmt: skip
            words = [f"--{key}={_text(value)}" for key, value in settings.items()]
            config: TrainConfig = load_recipe(f"{path}:{stage}", words).config
            node = self.train_node(
                f"{row.name}, {stage}, seed {seed}", config, written, parts if not ids else {}
            )
            written[config.output] = node.id
            if parts and not ids:
                assert node.config is not None
                words.append(f"--model.connector.init={_text(node.config.model.connector.init)}")
            ids.append(self.graph.add(node))
            commands.append(shlex.join(["vlmamba", "train", f"{path}:{stage}", *words]))
        if not ids:
            raise ConfigError(f"{path} has neither of the stages {', '.join(STAGES)}")
        return tuple(ids), tuple(commands)

    def train_node(
        self, label: str, config: TrainConfig, written: Mapping[str, str], parts: Mapping[str, str]
    ) -> Node:
        """A stage of training.

        Args:
            label: For people.
            config: As the recipe says.
            written: Output folders of the row's earlier stages, and their nodes.
            parts: Parts of the connector, and the nodes they start from.
        """
        connector = config.model.connector
        init = (
            {**connector.init, **{part: self.path(node) for part, node in parts.items()}}
            if not written
            else {}
        )
        start = written.get(config.init_from or "")
        resolved = config.replace(
            init_from=self.path(start) if start else config.init_from,
            model=config.model.replace(connector=connector.replace(init=init)),
        )
        depends = {
            "config": _result_keys(resolved),
            "init": start or fingerprint_path(config.init_from),
            "parts": {part: parts.get(part) or fingerprint_path(path) for part, path in init.items()},
            "files": [
                fingerprint_path(path)
                for path in (*_paths(config.model.vision.path), config.model.language.path)
            ]
            + [fingerprint_path(source.annotations) for source in config.data.sources]
            + [fingerprint_path(path) for path in (config.model.language.tokenizer,) if path is not None]
            + [fingerprint_path(path) for path in (config.model.chat,) if path.endswith(".jinja")],
        }
        node_id = f"train-{_digest(depends)}"
        return Node(
            id=node_id,
            kind="train",
            label=label,
            words=("train", f"{self.store}/nodes/{node_id}.yaml", "--resume"),
            needs=tuple(dict.fromkeys(n for n in (start, *parts.values()) if n)),
            config=resolved.replace(output=self.path(node_id)),
        )

    def evaluation(self, row: Row, seed: int, trained: str) -> str:
        tasks, switches = self.table.tasks, dict(row.switches)
        depends = {
            "model": trained,
            "tasks": {task: _task_fingerprint(task, self.table.folder) for task in tasks},
            "switches": switches,
        }
        node_id = f"eval-{_digest(depends)}"
        words = ["eval", self.path(trained), "--tasks", ",".join(tasks), "--output", self.path(node_id)]
        words += ["--folder", self.table.folder, *_switch_words(switches)]
        return self.graph.add(
            Node(node_id, "eval", f"{row.name}, evaluation, seed {seed}", tuple(words), (trained,))
        )

    def speed(self, row: Row, trained: str) -> str:
        switches = dict(row.switches)
        node_id = f"speed-{_digest({'model': trained, 'switches': switches})}"
        words = ["ablate", "speed", self.path(trained), "--output", f"{self.path(node_id)}.json"]
        node = Node(node_id, "speed", f"{row.name}, speed", (*words, *_switch_words(switches)), (trained,))
        return self.graph.add(node)

    def path(self, node_id: str) -> str:
        """Where a node's result is."""
        return str(self.store / node_id.partition("-")[0] / node_id)


def write_nodes(graph: Graph, store: str | Path) -> None:
    """Write the configs that train nodes are started from."""
    from vlmamba.common.files import replace_text

    folder = Path(store) / "nodes"
    folder.mkdir(parents=True, exist_ok=True)
    for node in graph.nodes.values():
        if node.config is not None:
            text, file = dump_yaml(node.config), folder / f"{node.id}.yaml"
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                replace_text(file, text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _switch_words(switches: Mapping[str, Any]) -> Iterator[str]:
    for name, value in switches.items():
        yield from (f"--{name.replace('_', '-')}", str(value))


def _result_keys(config: TrainConfig) -> dict[str, Any]:
    """The config without what changes no result, and without paths, which are fingerprinted by what they hold."""
    values = config.to_dict()
    for key in (*marked(TrainConfig, FREE), "init_from", "model.connector.init"):
        _remove(values, key.split("."))
    flat = flatten(config)
    for key, neutral in marked(TrainConfig, LATER).items():  # finished runs from before are still found
        if flat[key] == neutral:
            _remove(values, key.split("."))
    # How a step is cut changes rounding, so it stays part of what a run is.
    values["micro"] = [config.batch.micro_batch_size, config.batch.tokens_per_micro_batch]
    for source in values["data"]["sources"]:
        source.pop("hint", None)
    return values


def _remove(values: dict[str, Any], parts: list[str]) -> None:
    for part in parts[:-1]:
        values = values.get(part) or {}
    values.pop(parts[-1], None)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _paths(path: str | tuple[str, ...]) -> list[str]:
    return [path] if isinstance(path, str) else [each.rpartition("=")[2] for each in path]


def fingerprint_path(path: str | None) -> str:
    """Of what a file or folder holds: names, sizes, and the beginning, middle and end of each file; "absent" if it is
    not there.
    """
    if path is None:
        return ""
    given = Path(path)
    if given.is_file():
        files = [given]
    elif given.is_dir():
        files = sorted(
            p for p in given.rglob("*") if p.is_file() and "checkpoints" not in p.relative_to(given).parts
        )
    else:
        return f"absent: {path}"
    digest = hashlib.sha256()
    for file in files:
        digest.update(_sampled(str(file), file.stat().st_size, file.stat().st_mtime_ns))
        digest.update(str(file.relative_to(given) if file != given else file.name).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=4096)
def _sampled(path: str, size: int, changed: int) -> bytes:
    """Hash of a file's size and of three pieces of it."""
    digest = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as file:
        for at in sorted({0, max(size // 2 - SAMPLED_BYTES // 2, 0), max(size - SAMPLED_BYTES, 0)}):
            file.seek(at)
            digest.update(file.read(SAMPLED_BYTES))
    return digest.digest()


@lru_cache(maxsize=64)
def _task_fingerprint(task: str, folder: str) -> str:
    """Of a task's questions; "absent" where they are not there yet."""
    from vlmamba.errors import DataError, MissingDependencyError, MissingFileError
    from vlmamba.evaluation.task import load_task

    try:
        with users_words():
            return load_task(task, folder=folder).fingerprint
    except (MissingFileError, MissingDependencyError, DataError):
        return f"absent: {task}"
