"""What a table will take, before it runs: its runs, what rows share, hours and memory of the full-size ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import lru_cache

from vlmamba.ablations.execute import Store
from vlmamba.ablations.graph import Graph, Node
from vlmamba.ablations.table import Table
from vlmamba.config import dump_yaml
from vlmamba.errors import VLMambaError
from vlmamba.evaluation.tables import duration, text_table
from vlmamba.training.flops import peak_of

RECOMPUTED = 4 / 3
"""Work of a step that recomputes every block over one that does not: four passes instead of three."""


def describe_graph(
    table: Table, graph: Graph, store: Store, *, gpus: int = 8, memory: float = 80.0, gpu: str = "A100"
) -> str:
    """The run graph as text.

    Args:
        table: The table.
        graph: Its runs.
        store: Where finished ones are.
        gpus: GPUs of each training.
        memory: GiB of each.
        gpu: Their name.
    """
    rows, hours = [], []
    for node in graph.nodes.values():
        users = list(dict.fromkeys(cell.row for cell in graph.users(node.id)))
        shared = "; ".join(users) if len(users) > 1 else ""
        time, each = _time(node, graph, store, gpus, memory, gpu)
        hours += [each] if each is not None and store.outcome(node.id) is None else []
        starts = ", ".join(node.needs)
        state = "done" if store.outcome(node.id) else ""
        rows.append([node.id, node.label, time, state, starts, shared])
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


def _time(
    node: Node, graph: Graph, store: Store, gpus: int, memory: float, gpu: str
) -> tuple[str, float | None]:
    """Time of a node as text, and the hours estimated of a full-size training."""
    outcome = store.outcome(node.id)
    if outcome is not None:
        return duration(outcome.seconds), None
    if node.config is None:
        return "", None
    model = node.config.model.replace(connector=node.config.model.connector.replace(init={}))
    config = node.config.replace(output="x", init_from=None, seed=0, model=model)
    return _planned(dump_yaml(config), gpus, memory, gpu)


@lru_cache(maxsize=256)
def _planned(yaml_text: str, gpus: int, memory: float, gpu: str) -> tuple[str, float | None]:
    """Hours of a config; rows that differ in their seed or in what they start from only share the answer."""
    import tempfile
    from pathlib import Path

    from vlmamba.config import load_yaml
    from vlmamba.training.config import TrainConfig
    from vlmamba.training.plan import Planner, PlanSettings
    from vlmamba.training.plan_data import data_facts

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml_text, encoding="utf-8")
        config = load_yaml(file, TrainConfig)
    assert isinstance(config, TrainConfig)
    if config.precision == "fp32":
        return "", None  # a recipe for CPUs: no GPU's peak says how long it takes
    settings = PlanSettings(gpus=gpus, memory=memory, gpu=gpu)
    try:
        facts = data_facts(config)
        planner = Planner(config, settings)
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
