"""A whole table, its programs called in this process."""

import dataclasses
import json
import re

import pytest
import torch

from vlmamba.ablations import estimate
from vlmamba.ablations.collect import collect, with_kinds
from vlmamba.ablations.execute import Outcome, Store
from vlmamba.ablations.graph import expand, write_nodes
from vlmamba.ablations.report import write_report
from vlmamba.ablations.tables import format_rows
from vlmamba.cli import main
from vlmamba.errors import ConfigError
from vlmamba.evaluation.switches import apply_switches
from vlmamba.testing import tiny_model
from vlmamba.training import flops


def run_here(graph, store, *, skip=()):
    write_nodes(graph, store.root)
    for node in graph.nodes.values():
        if node.id not in skip:
            assert main(list(node.words)) == 0, node.label
            store.record(Outcome(node.id, node.label, " ".join(node.words), 0, 1.0, 0, "abc"))


@pytest.mark.filterwarnings("ignore")
def test_from_a_table_to_a_page(table, monkeypatch, capsys):
    monkeypatch.setenv("VLMAMBA_PROGRESS", "0")
    store = Store("store")
    graph = expand(table, store.root)
    run_here(graph, store)
    table = with_kinds(table)
    assert table.columns == ("tiny", "tiny/colour", "tiny/count")
    results = collect(table, graph, store)
    rows = {r.row.name: r for r in results}
    assert [r.row.name for r in results] == ["MLP", "VSS", "VSS, forward"]
    assert rows["MLP"].figures["tiny"].change is None
    assert rows["VSS"].figures["tiny"].change is not None
    assert len(rows["VSS"].figures["tiny"].values) == 2
    assert rows["VSS"].parameters == rows["VSS, forward"].parameters != rows["MLP"].parameters
    assert rows["VSS"].image_tokens == 16 and rows["VSS"].step_seconds > 0
    assert rows["VSS"].speed["decode_tokens_per_s"] > 0
    # The figure of a row is that of its evaluations.
    for seed in (1, 2):
        cell = graph.cells["VSS, forward", seed]
        found = json.loads((store.result(cell.evaluation) / "results.json").read_text())
        assert found["tasks"]["tiny"]["settings"]["switches"] == {"scan": "forward"}
        assert (
            found["tasks"]["tiny"]["headline"]["value"]
            == rows["VSS, forward"].figures["tiny"].values[seed - 1]
        )
    text = format_rows(table, results)
    assert re.search(r"^VSS, forward +\d", text, re.M)
    page = write_report(table, results, graph, store, "reports", name="tiny", command="vlmamba ablate tiny")
    html, markdown = page.read_text(), page.with_suffix(".md").read_text()
    assert "VSS against MLP: in the paper better on 1 of 1 benchmarks (+2.00 on average)" in html
    assert html.count("<svg") == len(list((page.parent / "tiny").glob("*.svg"))) >= 4
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (page.parent / name).is_file()
    assert "vlmamba train train/tiny.py:finetune --connector=vss-l2 --seed=2" in markdown
    figures = json.loads(page.with_suffix(".json").read_text())
    assert figures["rows"][1]["figures"]["tiny"]["values"] == list(rows["VSS"].figures["tiny"].values)


@pytest.mark.filterwarnings("ignore")
def test_a_row_that_failed_is_shown_with_its_log(table, monkeypatch):
    monkeypatch.setenv("VLMAMBA_PROGRESS", "0")
    store = Store("store")
    graph = expand(table, store.root, seeds=[1], rows=["MLP", "VSS"])
    bad = graph.cells["VSS", 1].train[0]
    store.log(bad).parent.mkdir(parents=True)
    store.log(bad).write_text("out of memory\n")
    run_here(
        graph,
        store,
        skip={*graph.cells["VSS", 1].train, graph.cells["VSS", 1].evaluation, graph.cells["VSS", 1].speed},
    )
    store.record(Outcome(bad, "VSS, pretrain, seed 1", "train", 1, 1.0, 0, None))
    results = collect(with_kinds(table), graph, store)
    assert results[1].problems == [("VSS, pretrain, seed 1", str(store.log(bad)))] and results[1].open == 3
    page = write_report(with_kinds(table), results, graph, store, "reports", name="t", command="x")
    assert "out of memory" in page.read_text()
    assert "| VSS | – |" in page.with_suffix(".md").read_text()
    assert "FAILED VSS, pretrain, seed 1" in format_rows(with_kinds(table), results)


def test_switches_change_a_trained_connector():
    model, processor = tiny_model(connector="qmamba")
    connector = model.multi_modal_projector
    before = connector.queries.detach().clone()
    apply_switches(model, processor, {"num_queries": connector.num_queries // 2})
    assert connector.num_tokens == processor.num_image_tokens == len(before) // 2
    assert torch.equal(connector.queries.detach(), before[::2][: len(connector.queries)])
    with pytest.raises(ConfigError, match=rf"has {connector.num_queries} queries, so 99 cannot be kept"):
        apply_switches(model, processor, {"num_queries": 99})
    with pytest.raises(ConfigError, match=r"unknown switch 'scans'. Did you mean 'scan'"):
        apply_switches(model, processor, {"scans": "bsm"})
    other, processor = tiny_model(connector="mlp")
    with pytest.raises(ConfigError, match=r"connector 'mlp' has no queries"):
        apply_switches(other, processor, {"num_queries": 2})


def test_the_command_line(project, capsys):
    assert main(["ablate"]) == 0
    assert "tiny                       Tiny (3 rows, recipe tiny)" in capsys.readouterr().out
    assert main(["ablate", "tiny", "--dry-run", "--store", "store", "--optim.lr", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "3 rows x 2 seeds: 8 train, 6 eval, 3 speed runs" in out
    assert "12 stages of training are asked for, 4 of them are the same as others" in out
    assert "VSS; VSS, forward" in out
    assert main(["ablate", "tiny", "--slurm", "jobs", "--store", "store"]) == 0
    assert "submit with: bash jobs/submit.sh" in capsys.readouterr().out
    assert main(["ablate", "tiny", "--node", "train-0", "--store", "store"]) == 2
    assert "has no node 'train-0' (any more)" in capsys.readouterr().err
    assert main(["ablate", "tiny", "--rows", "MPL"]) == 2
    assert "no row 'MPL'" in capsys.readouterr().err


def test_a_dry_run_builds_a_model_once_and_counts_a_part_once(table, monkeypatch):
    counted, built = [], []
    count, build = flops._count, estimate.build_meta_model
    monkeypatch.setattr(flops, "_counted", {})
    monkeypatch.setattr(flops, "_count", lambda part, *rest: counted.append(part) or count(part, *rest))
    monkeypatch.setattr(estimate, "build_meta_model", lambda config: built.append(config) or build(config))
    table = dataclasses.replace(table, settings={"precision": "bf16"})

    def described(rows, seeds):
        part = dataclasses.replace(table, rows=[r for r in table.rows if r.name in rows])
        before = len(counted), len(built)
        text = estimate.describe_graph(part, expand(part, "store", seeds=seeds), Store("store"), gpus=2)
        return text, len(counted) - before[0], len(built) - before[1]

    text, parts, models = described(["MLP"], [1])
    assert re.search(r"train-\w+ +MLP, pretrain, seed 1 +\d+\.\d h", text)
    assert models == 1  # of both stages
    assert parts <= 6  # tower, connector, and the language model and its head, frozen and trained
    _, parts, models = described(["MLP", "VSS", "VSS, forward"], [1, 2, 3])
    assert (parts, models) == (1, 2)  # the other connector
