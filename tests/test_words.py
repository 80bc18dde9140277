"""Words are true: extras, settings, commands, variables and names that messages and pages send people to exist."""

import ast
import contextlib
import importlib
import importlib.metadata
import io
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from vlmamba.cli import VERBS, main
from vlmamba.config import field_infos
from vlmamba.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = ("log.md", "benchmarks.md")  # of their time, which later code may outgrow
CODE = sorted(
    [*(ROOT / "vlmamba").rglob("*.py"), *(ROOT / "train").glob("*.py"), *(ROOT / "eval").rglob("*.py")]
)
NOT_YET = {
    "README.md": ["Not shown yet:"],
    "docs/training.md": ["nothing has been run on several GPUs yet"],
    "docs/ssm.md": ["On GPUs nothing has been measured yet"],
}
"""What is said to be still missing, and is."""
WORDS_ONLY = (
    *("not there yet", "not yet tokenised", "not run yet", "has run yet", "nothing is yet"),
    *("no export yet", "of people yet"),
)
"""Where the word says nothing about vlmamba."""


@cache
def literals():
    """(file and line, text, whether it is a docstring) of every text in the code, with {} for values in it."""
    found = []
    for file in CODE:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside, docs = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docs.add(id(node.value))
            if isinstance(node, ast.JoinedStr):
                inside.update(map(id, node.values))
        for node in ast.walk(tree):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                found.append((where, "".join(parts), False))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                found.append((where, node.value, id(node) in docs))
    return found


@cache
def texts():
    """(where, text) of the code's texts and of the pages."""
    pages = [
        (str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in PAGES if p.name not in RECORDS
    ]
    return [*((where, text) for where, text, _ in literals()), *pages]


@cache
def extras():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]


@pytest.fixture
def check():
    """Collects what is wrong, all of which is said at the end."""
    wrong = []
    yield lambda right, what: right or wrong.append(what)
    assert not wrong, "\n".join(wrong)


def normal(name):
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;(]", name)[0]).lower()


@cache
def brought(extra):
    """Distributions that an extra brings, directly or not, as far as they are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    queue, seen = [*extras()[extra], *project["dependencies"]], set()
    while queue:
        requirement = queue.pop()
        name = normal(requirement)
        if name == "vlmamba":
            inner = re.search(r"\[(.*?)\]", requirement)
            queue += [r for each in inner[1].split(",") for r in extras()[each]] if inner else []
        elif name not in seen:
            seen.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                queue += [r for r in importlib.metadata.requires(name) or [] if "extra ==" not in r]
    return seen


def test_extras_that_are_named_exist(check):
    for where, text in texts():
        for names in re.findall(r"vlmamba\[([\w, -]+)\]", text):
            for name in names.split(","):
                check(name.strip() in extras(), f"{where}: vlmamba[{name}]")


def test_an_extra_brings_what_it_is_named_for(check):
    provided = importlib.metadata.packages_distributions()
    count = 0
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and node.keywords:
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                module = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                if given.get("extra") is not None:
                    check(given["extra"] in extras(), f"{where}: {given['extra']}")
                if given.get("extra") in extras() and module is not None:
                    top = module.split(".")[0]
                    names = {normal(n) for n in provided.get(top, [top])}
                    check(
                        names & brought(given["extra"]), f"{where}: vlmamba[{given['extra']}] brings no {top}"
                    )
                    count += 1
    assert count > 10


@cache
def settings():
    """Dotted keys of the config and of the configs in it, positions as N."""
    leaves = {re.sub(r"\.\d+", ".N", info.path) for info in field_infos(TrainConfig)}
    inner = {key.rsplit(".", n)[0] for key in leaves for n in range(1, key.count(".") + 1)}
    return leaves | inner


def is_setting(key):
    key = re.sub(r"\.\d+", ".N", key)
    open_ended = any(key.startswith(f"{d}.") for d in ("model.connector.options", "model.connector.init"))
    return key in settings() or open_ended or re.fullmatch(r"(lora|evaluations\.N|optim\.groups)(\..+)?", key)


def test_settings_that_are_named_exist(check):
    top = "|".join(sorted({key.split(".")[0] for key in settings() if "." in key} - {"model"}))
    parts = "|".join(sorted({key.split(".")[1] for key in settings() if key.startswith("model.")}))
    key = rf"((?:{top}|model\.(?:{parts}))\.[a-z_0-9.]*[a-z_0-9])|--([a-z_]+\.[a-z_0-9.]*[a-z_0-9])"
    dotted = re.compile(rf"(?<![\w./:-])(?:{key})(?![\w(./]|:\w)")
    count = 0
    for where, text in texts():
        for key in filter(None, sum(dotted.findall(text), ())):
            if key == "a.b" or re.search(r"\.(py|md|json|jsonl|jinja|yaml|png)$", key):
                continue
            count += 1
            check(is_setting(key), f"{where}: {key}")
    assert count > 100


def test_settings_that_a_message_tells_to_set_exist(check):
    told = re.compile(r"\b(?:[Ss]et|[Rr]aise|[Ll]ower|[Uu]nset) (?:--)?([a-z]+(?:[._][a-z0-9]+)+)\b")
    for where, text, is_doc in literals():
        if not is_doc and not where.startswith("vlmamba/ssm"):
            for key in told.findall(text):
                check(is_setting(key) or key in ARGUMENTS, f"{where}: {key}")


ARGUMENTS = {"tie_word_embeddings", "max_length"}
"""What messages tell to set that is no setting of a run: a field of config.json, an argument of the call."""


@cache
def help_of(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main([*words, "--help"])
    return out.getvalue()


def test_commands_that_are_named_exist(check):
    command = re.compile(r"(?<![\w/.-])vlmamba ((?:[a-z]+)\b(?:[ ](?:--?[\w.-]+|[\w./:{}<>\[\]=,*-]+))*)")
    count = 0
    for where, text in texts():
        if where.endswith(".md"):  # fences are tested by test_docs
            text = "\n".join(re.findall(r"`(vlmamba [^`\n]+)`", text))
        for words in (found.split() for found in command.findall(text)):
            flags = [w.partition("=")[0] for w in words if w.startswith("--")]
            if words[0] not in VERBS:
                check(not flags and not where.endswith(".md"), f"{where}: vlmamba {' '.join(words)}")
                continue
            count += 1
            two = words[1:2] and words[0] in ("check", "data", "eval") and words[1] in help_of(words[0])
            text_of = help_of(*words[: 2 if two and words[1] in SUBVERBS else 1])
            for flag in flags:
                known = flag in text_of or is_setting(flag.removeprefix("--")) or words[0] == "train"
                check(known, f"{where}: vlmamba {' '.join(words)}: {flag}")
    assert count > 40


SUBVERBS = ("language", "run", "score", "check", "show", "stats", "convert")


def test_variables_that_are_named_are_read(check):
    read = "\n".join(p.read_text(encoding="utf-8") for p in CODE)
    read += "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "scripts").rglob("*.s*") if p.is_file())
    for where, text in texts():
        for name in re.findall(r"\bVLMAMBA_[A-Z_]+[A-Z]\b", text):
            check(re.search(rf"\"{name}\"|\{{{name}[:}}]|\${name}\b|\b{name}=", read), f"{where}: {name}")


def test_names_of_the_library_that_are_named_exist(check):
    count = 0
    for where, text in texts():
        for name in set(re.findall(r"`(vlmamba(?:\.\w+)+)(?:\(.*?\))?`", text)):
            if not name.endswith((".py", ".md")):
                count += 1
                check(resolves(name), f"{where}: {name}")
    assert count > 50


def resolves(name):
    parts = name.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:at]))
        except ImportError:
            continue
        for part in parts[at:]:
            fields = getattr(found, "__dataclass_fields__", {})
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_what_is_said_to_be_missing_is_listed(check):
    found = {}
    for where, text in texts():
        for sentence in re.findall(r"[^.\n]*\b(?:not|Not|no|nothing)\b[^.\n]*\byet\b[^.\n]*", text):
            if not any(words in sentence for words in WORDS_ONLY):
                found.setdefault(where.split(":")[0], []).append(sentence)
    for place, sentences in found.items():
        for sentence in sentences:
            check(any(listed in sentence for listed in NOT_YET.get(place, ())), f"{place}: {sentence}")
    for place, listed in NOT_YET.items():
        check(len(listed) == len(found.get(place, ())), f"{place}: list what is missing, and nothing else")
