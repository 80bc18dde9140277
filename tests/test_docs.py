"""The documentation is true: links and paths exist, commands parse, recipes resolve, marked code runs."""

import ast
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from vlmamba.cli import VERBS, main
from vlmamba.config import load_recipe
from vlmamba.config.recipe import recipe_functions

ROOT = Path(__file__).resolve().parents[1]
LOGS = ("log.md", "benchmarks.md")  # records of their time, which later code may outgrow
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in LOGS)]
GENERATED = ("playground/data/", "docs/benchmarks.md", "docs/log.md")
TOP = ("docs", "eval", "playground", "scripts", "tests", "train", "vlmamba")
FENCE = re.compile(r"^(?:<!-- (run[^>]*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDERS = ("RECIPE", "...", "NAME", " P ")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def blocks(page, language=None):
    """(mark, language, code) of every fenced block."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(mark, kind, code) for mark, kind, code in found if language in (None, kind)]


def prose(page):
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands():
    """Every command line of ``bash`` and unmarked fences, as (page name, line)."""
    lines = []
    for page in PAGES:
        for _, kind, code in blocks(page):
            if kind not in ("bash", ""):
                continue
            for raw in code.splitlines():
                line = raw.split("  #")[0].strip().removeprefix("srun ")
                if line.startswith(("vlmamba ", "bash scripts/")) and not any(
                    p in line for p in PLACEHOLDERS
                ):
                    lines.append((page.name, line))
    return list(dict.fromkeys(lines))


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("http://", "https://")), target
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(
                r"^#+ (.+)$", FENCE.sub("", linked.read_text(encoding="utf-8")), re.MULTILINE
            )
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(TOP)})/[\w./-]*\w", text)):
        if "." in Path(path).name and not path.startswith(GENERATED) and "/v1_5/" not in path:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if f"({p.name})" not in index] == ["index.md"]


def test_recipes_that_are_named_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?<![\w/])(?:train/)?(\w+?)(?:\.py)?:(pretrain|finetune)\b", text)
        named += [(name, kind) for kind, name in re.findall(r"scripts/(pretrain|finetune)\.sh (\w+)", text)]
        for name, function in named:
            if name == "RECIPE":
                continue
            assert function in recipe_functions(ROOT / "train" / f"{name}.py"), (
                f"{page.name}: {name}:{function}"
            )


def test_pages_have_commands():
    assert len(commands()) > 25


def arguments_of(line):
    """The words of ``vlmamba`` that a command line comes to, or None for another script."""
    words = shlex.split(line)
    if words[0] == "vlmamba":
        return words[1:]
    script = words[1]
    assert (ROOT / script).is_file(), line
    stage = Path(script).stem
    if stage in ("pretrain", "finetune"):
        rest = words[2:]
        recipe = rest.pop(0) if rest and not rest[0].startswith("-") else "vl_mamba"
        return ["train", f"{recipe}:{stage}", *rest]
    if stage == "quickstart":
        return ["train", "playground:pretrain", *words[2:]]
    if stage == "eval":
        return ["eval", words[2], "--tasks", ",".join(words[3:])]
    return None


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_accepted(page, line, monkeypatch, capsys, request):
    monkeypatch.chdir(ROOT)
    words = arguments_of(line)
    if words is None:
        return
    assert words[0] in VERBS, line
    if words[0] == "train":
        if any("my_pool" in word for word in words):
            request.getfixturevalue("pool")
        own = {"--dry-run", "--resume", "--print-config", "--help-config"}
        load_recipe(words[1], [w for w in words[2:] if w not in own])
        return
    with pytest.raises(SystemExit):
        main([*words[: 2 if words[1:2] in (["score"], ["check"]) else 1], "--help"])
    text = capsys.readouterr().out
    for word in words:
        assert not word.startswith("--") or word in text, f"{line}: {word}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["train", "vl_mamba:pretrain", "--dry-run"],
            [
                "64 layers of width 2560",
                "729 visual tokens",
                "50,752,000 of 3,216,843,040",
                "2,181 steps in all",
            ],
        ),
        (
            ["train", "vl_mamba:finetune", "--dry-run"],
            ["2,819,097,600 of 3,216,843,040", "5,198 steps in all"],
        ),
        (["train", "q_mamba:pretrain", "--dry-run"], ["256 visual tokens", "379,572,480"]),
        (["train", "cobra:finetune", "--dry-run"], ["729 visual tokens", "47,789,568"]),
        (["train", "vl_mamba:pretrain", "--print-config"], ["name: vss-l2"]),
        (["train", "vl_mamba:pretrain", "--help-config"], ["optim.lr"]),
        (["info"], ["vss-l2", "vicuna_v1", "siglip2", "reference"]),
    ],
    ids=lambda value: (
        " ".join(value[:3]) if isinstance(value, list) and value[0] in ("train", "info") else ""
    ),
)
def test_commands_say_what_the_pages_say(words, says, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(words) == 0
    out = capsys.readouterr().out
    for expected in says:
        assert expected in out


@pytest.fixture
def pool(monkeypatch):
    """The module that docs/adding_a_connector.md lets the reader write, for one test; gives the page's tests."""
    code = {mark: code for mark, _, code in blocks(ROOT / "docs" / "adding_a_connector.md", "python")}
    module = types.ModuleType("my_pool")
    monkeypatch.setitem(sys.modules, "my_pool", module)
    exec(compile(code["run: file"], "my_pool.py", "exec"), vars(module))
    return code["run: test"]


def test_the_connector_of_the_page_passes_the_tests_of_the_page(pool, tmp_path):
    from vlmamba.models.connectors import build_connector

    assert build_connector("my_pool:PoolConnector", vision_dim=8, text_dim=8, grid=(27, 27)).num_tokens == 81
    names: dict = {}
    exec(compile(pool, "docs/adding_a_connector.md", "exec"), names)
    tests = [value for key, value in names.items() if key.startswith("test_")]
    assert len(tests) == 2
    tests[0]()
    tests[1](tmp_path)


@pytest.mark.usefixtures("pool")
def test_the_table_of_the_page_compares_what_the_page_says(tmp_path, monkeypatch):
    from vlmamba.ablations import load_table
    from vlmamba.ablations.graph import expand
    from vlmamba.models.builder import build_meta_model

    (code,) = [
        code for mark, _, code in blocks(ROOT / "docs" / "ablations.md", "python") if mark == "run: table"
    ]
    (tmp_path / "pooling.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    table = load_table(str(tmp_path / "pooling.py"))
    graph = expand(table, tmp_path / "store", seeds=[1])
    tokens = {
        row.name: build_meta_model(
            graph.nodes[graph.cells[row.name, 1].train[-1]].config.model
        ).multi_modal_projector.num_tokens
        for row in table.rows
    }
    assert tokens == {"MLP, 64 tokens": 64, "pooled, 16 tokens": 16, "pooled, 4 tokens": 4}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the marked blocks need: a finished run (of a tiny model) and a picture."""
    from vlmamba.testing import tiny_model, write_images

    model, processor = tiny_model("vss-l2")
    export = tmp_path / "runs/quickstart/finetune/export"
    model.save_pretrained(export)
    processor.save_pretrained(export)
    (tmp_path / write_images(tmp_path, 1)[0]).rename(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


MARKED = [page for page in PAGES if any(mark == "run" for mark, _, _ in blocks(page))]


@pytest.mark.parametrize("page", MARKED, ids=lambda p: p.name)
def test_marked_code_runs(page, workplace, capsys):
    if page.name == "trl.md":
        pytest.importorskip("trl")
        pytest.importorskip("transformers", minversion="5.18")  # as the page says
    names: dict = {"__name__": "__main__"}
    for mark, _, code in blocks(page, "python"):
        if mark == "run":
            exec(compile(code, page.name, "exec"), names)
    out = capsys.readouterr().out
    if page.name == "connectors.md":
        assert out.split() == ["729", "50752000"]
        assert '"scan": "forward"' in (workplace / "forward-only/config.json").read_text(encoding="utf-8")
    if page.name == "data.md":
        assert out.startswith("6 rows, 3 images, 1 rows that cannot be used")


def test_all_python_compiles():
    for page in PAGES:
        for _, _, code in blocks(page, "python"):
            ast.parse(code)


def test_the_sizes_of_connectors_are_those_of_the_page():
    import torch
    import yaml

    from vlmamba.models.connectors import build_connector

    page = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \| (\d+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 10
    for cell, tokens, parameters in rows:
        name, *words = re.findall(r"`([^`]+)`", cell)
        options = {k: yaml.safe_load("null" if v == "none" else v) for k, v in (w.split("=") for w in words)}
        with torch.device("meta"):
            width = 2176 if "2176" in cell else 1152
            connector = build_connector(name, vision_dim=width, text_dim=2560, grid=(27, 27), **options)
        count = sum(p.numel() for p in connector.parameters())
        assert (connector.num_tokens, count) == (int(tokens), int(parameters.replace(",", ""))), cell


def test_options_of_connectors_are_all_documented():
    from vlmamba.models.connectors import CONNECTORS
    from vlmamba.models.connectors.base import option_names

    page = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
    for name in CONNECTORS.names():
        for option in option_names(CONNECTORS.get(name)):
            assert f"`{option}`" in page, f"{name}: {option}"


def test_counters_of_irregular_rows_are_those_of_the_code():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "vlmamba" / "data").glob("*.py"))
    table = page.split("| Row | What vlmamba does | Counter |")[1].split("\n\n")[0]
    cells = [line.rsplit("|", 2)[1] for line in table.splitlines()[2:]]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    for name in named:
        assert f'"{name}"' in code, name
    from vlmamba.data import conversation

    events = set(re.findall(r"^    (\w+)  ", conversation.__doc__ or "", re.MULTILINE))
    assert len(events) >= 8
    assert events <= named
    kinds = {"shape", "image", "image_count", "token_without_image", "too_long", "no_label"}
    assert kinds <= named


def test_tables_name_every_part():
    from vlmamba.models.chat import template_names
    from vlmamba.models.connectors import CONNECTORS
    from vlmamba.models.vision import encoders
    from vlmamba.models.vision.presets import PRESETS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    model = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    for name in [*CONNECTORS.names(), *encoders.names(), *PRESETS]:
        assert f"`{name}`" in readme, name
    for name in template_names():
        assert f"`{name}`" in model, name


def test_log_fields_are_those_of_the_code():
    from vlmamba.training.metrics import Window
    from vlmamba.training.parallel import make_parallel

    line = Window().line(make_parallel("single", "cpu"), step=1, epoch=0.5, grad_norm=1.0, lr=1e-3, skipped=0)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.+?) \|", page.split("### Log fields")[1].split("##")[0], re.MULTILINE)
    assert set(line) == set(re.findall(r"`(\w+)`", " ".join(cells)))


def test_what_may_differ_on_resume_is_what_the_code_allows():
    from vlmamba.config import FREE, marked
    from vlmamba.training.config import TrainConfig

    text = prose(ROOT / "docs" / "training.md").split("What may differ:")[1].split("Any other")[0]
    assert set(re.findall(r"`([\w.]+)`", text)) == set(marked(TrainConfig, FREE))


def test_the_picture_is_well_formed_and_self_contained():
    import xml.etree.ElementTree as ElementTree

    picture = ROOT / "docs" / "architecture.svg"
    root = ElementTree.parse(picture).getroot()
    assert root.tag.endswith("svg")
    text = picture.read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "href" not in text
    assert "<script" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_name_no_private_place(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.-])/(?:work|home|root|tmp|mnt|Users)/", text)
