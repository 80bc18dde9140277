from pathlib import Path

import pytest

from vlmamba.ablations import Row, Table, load_table
from vlmamba.ablations.graph import expand
from vlmamba.config import names_in
from vlmamba.errors import ConfigError, MissingFileError

ROOT = Path(__file__).parents[2]
PLAYGROUND = [
    "connector_speed", "q_mamba_attention", "q_mamba_initialisation", "q_mamba_layers", "q_mamba_queries",
    "q_mamba_scan",
    "vl_mamba_connectors", "vl_mamba_scans",
]  # fmt: skip


def make(**changes):
    values = {"title": "T", "recipe": "tiny", "rows": [Row(name="A"), Row(name="B")], "columns": ("tiny",)}
    return Table(**{**values, **changes})


def test_the_papers_eight_tables_and_ours_are_there():
    assert names_in(ROOT / "eval" / "ablations") == sorted(
        [*PLAYGROUND, "vl_mamba_encoders", "vl_mamba_language"]
    )


@pytest.mark.parametrize("name", names_in(ROOT / "eval" / "ablations"))
def test_every_table_expands_under_its_own_recipe(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    table = load_table(name)
    graph = expand(table, tmp_path, seeds=[1])
    trained = [n for n in graph.nodes.values() if n.kind == "train"]
    assert all(node.config is not None and node.config.seed == 1 for node in trained)
    assert {cell.row for cell in graph.cells.values()} >= {row.name for row in table.shown}
    # Rows without a switch are trainings of their own.
    assert len({graph.cells[row.name, 1].train for row in table.shown if not row.switches}) == len(
        [row for row in table.shown if not row.switches]
    )


@pytest.mark.parametrize("name", PLAYGROUND)
def test_connector_tables_expand_under_the_playground(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    graph = expand(load_table(name, "playground"), tmp_path)
    configs = [n.config for n in graph.nodes.values() if n.config is not None]
    assert {c.model.language.path for c in configs} == {"playground/mini/mamba"}
    assert {c.epochs for c in configs} == {1, 2}


def test_tables_of_published_parts_refuse_other_recipes(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"published encoders, under vl_mamba only, not 'playground'"):
        load_table("vl_mamba_encoders", "playground")


def test_q_mambas_paper_figures_are_those_of_its_table_1(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = {row.name: row.paper for row in load_table("q_mamba_queries").rows}
    assert rows["Q = 256"] == {
        "VQAv2": 75.01, "GQA": 58.10, "VizWiz": 50.53, "TextVQA": 48.8, "POPE": 86.9, "MMBench": 57.7,
        "s/iteration": 6.54,
    }  # fmt: skip
    assert rows["VL-Mamba, forward only"]["VizWiz"] == 29.17
    assert "s/iteration" not in rows["Cobra"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [Row(name="A"), Row(name="A")]}, "two rows called 'A'"),
        ({"rows": [Row(name="A", shown=False)]}, "no row to show"),
        ({"columns": ()}, "measures nothing: name at least one task"),
        ({"seeds": (1, 1)}, r"seeds must be different numbers, got \[1, 1\]"),
        ({"baseline": "b"}, "the baseline is 'b', which is no row. Rows: A, B"),
        ({"rows": [Row(name="A", parts={"pre": "X"})]}, "part 'pre' of row 'A' is 'X', which is no row"),
        ({"rows": [Row(name="A", switches={"scann": "bsm"})]}, "unknown switch 'scann'. Did you mean 'scan'"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_names_and_paths_of_tables(project):
    assert load_table("tiny").title == load_table("eval/ablations/tiny.py").title == "Tiny"
    with pytest.raises(ConfigError, match=r"unknown table 'tinny'. Did you mean 'tiny'"):
        load_table("tinny")
    with pytest.raises(MissingFileError, match=r"no table file my/table.py"):
        load_table("my/table.py")
    Path("eval/ablations/bad.py").write_text("def table(recipe='x'): return 3\n")
    with pytest.raises(ConfigError, match=r"returned int, not a vlmamba.ablations.Table"):
        load_table("bad")
    Path("eval/ablations/none.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match=r"defines no function table"):
        load_table("none")


def test_rows_are_named_in_lists_though_their_names_hold_commas():
    table = make(
        rows=[Row(name=n) for n in ("VSS-L2", "VSS-L2, CSM", "MLP", "Q, 64 trained, 22 kept", "A; B")]
    )
    assert table.named(["VSS-L2, CSM"]) == ["VSS-L2, CSM"]
    assert table.named(["MLP,VSS-L2, CSM,VSS-L2"]) == ["MLP", "VSS-L2, CSM", "VSS-L2"]
    assert table.named(["VSS-L2; MLP", "Q, 64 trained, 22 kept"]) == [
        "VSS-L2",
        "MLP",
        "Q, 64 trained, 22 kept",
    ]
    assert table.named(["VSS-L2,MPL, MLP"]) == ["VSS-L2", "MPL", "MLP"]
    assert table.named(["A; B"]) == ["A; B"]
    assert table.named([]) == []
