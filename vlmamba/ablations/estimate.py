"""What a table will take, before it runs: its runs, what rows share, and hours of the full-size ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from vlmamba.ablations.execute import Store
from vlmamba.ablations.graph import Graph, Node
from vlmamba.ablations.table import Table
from vlmamba.config import dump_yaml
from vlmamba.errors import VLMambaError
from vlmamba.evaluation.tables import duration, text_table
from vlmamba.models.builder import build_meta_model
from vlmamba.training.config import TrainConfig
from vlmamba.training.flops import peak_of
from vlmamba.training.plan import Planner, PlanSettings
from vlmamba.training.plan_data import data_facts

RECOMPUTED = 4 / 3
"""Work of a step that recomputes every block over one that does not: four passes instead of three."""


def describe_graph(table: Table, graph: Graph, store: Store, *, gpus: int = 8, gpu: str = "A100") -> str:
    """The run graph as text.

    Args:
        table: The table.
        graph: Its runs.
        store: Where finished ones are.
        gpus: GPUs of each training.
        gpu: Their name.
    """
    rows, hours = [], []
    plans: dict[str, tuple[str, float | None]] = {}
    models: dict[str, Any] = {}
    for node in graph.nodes.values():
        users = list(dict.fromkeys(cell.row for cell in graph.users(node.id)))
        shared = "; ".join(users) if len(users) > 1 else ""
        outcome = store.outcome(node.id)
        time, state = "", ""
        if outcome is not None:
            time, state = duration(outcome.seconds), "done"
        elif node.config is not None:
            key = _what_takes_time(node.config)
            plans[key] = plans.get(key) or _planned(node.config, gpus, gpu, models)
            time, each = plans[key]
            hours += [] if each is None else [each]
        rows.append([node.id, node.label, time, state, ", ".join(node.needs), shared])
    kinds = {kind: [n for n in graph.nodes.values() if n.kind == kind] for kind in ("train", "eval", "speed")}
    counts = ", ".join(f"{len(nodes)} {kind}" for kind, nodes in kinds.items())
    wanted = sum(len(cell.train) for cell in graph.cells.values())
    lines = [
        table.title,
        f"{len(table.shown)} rows x {len({seed for _, seed in graph.cells})} seeds: {counts} runs; {wanted} stages of "
        f"training are asked for, {wanted - len(kinds['train'])} of them are the same as others",
        "",
        text_table(["node", "what", "time", "state", "starts from", "shared by"], rows, left=6),
        "",
    ]
    if hours:
        total = sum(hours)
        lines.append(
            f"training that is left: {total:.1f} hours of {gpus} x {gpu} ({total * gpus:.0f} GPU hours), one run after "
            "another, at the MFU that `vlmamba plan` assumes; evaluation comes on top"
        )
    lines += _measured(kinds["train"], store)
    return "\n".join(lines)


def _what_takes_time(config: TrainConfig) -> str:
    """A config without its seed and what it starts from: runs that differ in these only take the same time."""
    model = config.model.replace(connector=config.model.connector.replace(init={}))
    return dump_yaml(config.replace(output="x", init_from=None, seed=0, model=model))


def _planned(config: TrainConfig, gpus: int, gpu: str, models: dict[str, Any]) -> tuple[str, float | None]:
    """Time of a full-size training as text, and in hours where it is known; stages share their model."""
    if config.precision == "fp32":
        return "", None  # a recipe for CPUs: no GPU's peak says how long it takes
    settings = PlanSettings(gpus=gpus, gpu=gpu)
    try:
        facts = data_facts(config)
        sizes = dump_yaml(
            config.model.replace(chat="plain", connector=config.model.connector.replace(init={}))
        )
        if sizes not in models or config.lora is not None:
            models[sizes] = build_meta_model(config.model)
        planner = Planner(config, settings, models[sizes] if config.lora is None else models.pop(sizes))
    except VLMambaError as error:
        return f"not known: {str(error).splitlines()[0][:80]}", None
    samples = planner.samples(facts.samples, facts.tokens)
    if samples is None:
        return "unknown number of rows", None
    work = planner.flops_of(samples) * (RECOMPUTED if config.gradient_checkpointing else 1.0)
    hours = work / (gpus * (peak_of(gpu) or 0.0) * settings.mfu) / 3600
    return f"{hours:.1f} h", hours


def _measured(nodes: Iterable[Node], store: Store) -> list[str]:
    """What finished trainings took, for tables that run where no peak is known."""
    taken = [o.seconds for node in nodes if (o := store.outcome(node.id)) is not None]
    if not taken:
        return []
    return [f"{len(taken)} trainings are done; they took {duration(statistics.median(taken))} each (median)"]
