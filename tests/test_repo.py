"""The repository's own rules: import direction, light import, wheel, no machine's paths, short scripts, versions."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "vlmamba").rglob("*.py"))
PROGRAMS = sorted(
    p
    for folder in ("train", "eval", "playground", "scripts", "benchmarks")
    for p in (ROOT / folder).glob("*.py")
)

# Who may import whom (besides itself, errors, registry, config and common).
MAY_IMPORT = {
    "errors": set(),
    "registry": set(),
    "config": set(),
    "common": set(),
    "pages": set(),
    "ssm": set(),
    "models": {"ssm"},
    "checkpoints": {"ssm", "models"},
    "data": {"pages"},
    "training": {"ssm", "models", "data", "checkpoints"},
    "evaluation": {"ssm", "models", "data", "checkpoints", "pages"},
    "integrations": {"ssm", "models", "data", "evaluation"},
    "ablations": {"ssm", "models", "data", "training", "evaluation", "pages"},
    "interpret": {"ssm", "models", "data", "evaluation", "pages"},
    "testing": {"ssm", "models", "data", "training"},
    "cli": {
        "ssm",
        "models",
        "data",
        "checkpoints",
        "training",
        "evaluation",
        "integrations",
        "interpret",
        "ablations",
        "pages",
        "testing",  # `vlmamba check language --all` is about its tiny models
    },
}
# Of the ground floor, one file may reach up, inside its functions only: loading a model needs the models.
MAY_REACH_UP = {"common/load.py": {"models", "ssm", "training"}}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT / "vlmamba").parts[0].removesuffix(".py")
    upwards = MAY_REACH_UP.get(str(path.relative_to(ROOT / "vlmamba")), set())
    body = ast.parse(path.read_text(encoding="utf-8")).body
    early = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in early if name.split(".")[1:2] and name.split(".")[1] in upwards]
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in {"train", "eval", "scripts", "playground", "tests"}, f"{path} imports {name}"
        target = rest.split(".")[0] if top == "vlmamba" else ""
        if target and room in MAY_IMPORT and target not in {room, "errors", "registry", "config", "common"}:
            assert target in MAY_IMPORT[room] | upwards, f"{path}: {room} may not import {name}"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_import_only_the_library(path):
    siblings = {p.stem for p in path.parent.glob("*.py")} if path.parent.name == "playground" else set()
    for name in imports(path):
        assert name.split(".")[0] not in {"train", "eval", "scripts", "playground", "tests"} - siblings, name


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func.value), node.func.attr, given, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", [*PYTHON, *PROGRAMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_can_run_code(path):
    loaders = ("auto", "vlmamba", "model_class")
    for owner, name, given, where in calls(path):
        if name in ("from_pretrained", "from_config") and owner.lower().startswith(loaders):
            assert given.get("trust_remote_code") is False, where
        if (owner, name) == ("torch", "load"):
            assert given.get("weights_only") is True, where
        if (owner, name) == ("np", "load"):
            assert given.get("allow_pickle") is False, where
        assert owner not in ("pickle", "marshal", "shelve") or not name.startswith("load"), where
        assert (owner, name) != ("yaml", "load") or path.name == "values.py", where  # with a SafeLoader
        assert name not in ("unsafe_load", "full_load"), where
    assert path.name == "old_shards.py" or "pickle.Unpickler" not in path.read_text(encoding="utf-8")


# Files are written through common/files.py; these open one themselves, and why.
MAY_WRITE = {
    "common/files.py": "the one place",
    "data/cache.py": "numpy writes into `replaced`",
    "data/checks.py": "bytes into `replaced`",
    "evaluation/records.py": "answers, appended and synced",
    "interpret/report.py": "bytes into `replaced`",
    "ablations/execute.py": "a child's output",
    "training/faults.py": "stacks of a process that hangs",
    "ssm/backends/cpu_build.py": "what a compiler is given, in a folder of its own",
    "testing/data.py": "tests",
    "testing/processes.py": "tests",
}


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_written_in_one_place(path):
    if str(path.relative_to(ROOT / "vlmamba")) in MAY_WRITE:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            writes = name == "open" and any(re.fullmatch("[rwaxbt+]*[wax+][rwaxbt+]*", m) for m in mode)
            assert name not in ("write_text", "write_bytes", "mkstemp") and not writes, (
                f"{path}:{node.lineno}"
            )


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_stub_is_left(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)
    assert not re.search(r"raise NotImplementedError(\(\))?\s*$", source, re.M)


def test_importing_vlmamba_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import vlmamba; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert took < 1, took"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_imports_without_optional_packages():
    optional = [
        "mamba_ssm",
        "causal_conv1d",
        "flash_attn",
        "deepspeed",
        "datasets",
        "open_clip",
        "timm",
        "triton",
    ]
    optional += [
        "tensorboard",
        "peft",
        "gradio",
        "accelerate",
        "sklearn",
        "skimage",
        "matplotlib",
        "torchdata",
        "selective_scan_cuda",
    ]
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in PYTHON
        if p.name != "__main__.py"
    ]
    code = f"""
import importlib, importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {set(optional)!r}:
            caller = sys._getframe(1)
            while caller and 'importlib' in caller.f_code.co_filename:
                caller = caller.f_back
            if caller and '/vlmamba/' in caller.f_code.co_filename.replace('\\\\', '/'):
                raise ImportError(name + ' imported by ' + caller.f_code.co_filename)
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_wheel_holds_vlmamba_alone(tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            str(ROOT),
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            str(tmp_path),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vlmamba"}
    assert sum(t.endswith(".dist-info") for t in tops) == 1
    assert "vlmamba/py.typed" in names
    assert "vlmamba/models/templates/vicuna_v1.jinja" in names
    packaged = {n for n in names if n.endswith(".py")}
    assert packaged == {str(p.relative_to(ROOT)) for p in PYTHON}


def tracked():
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\n") if name and (ROOT / name).is_file()]


def test_no_path_of_one_machine():
    pattern = re.compile(r"(?<![\w./~-])/(work|root|mnt|home|Users|scratch)/\w")
    for path in tracked():
        if path.suffix in {".py", ".sh", ".md", ".toml", ".yaml", ".jinja", ".json"} and path != Path(
            __file__
        ):
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
                assert len(line) > 5000 or not pattern.search(line), f"{path}:{number}: {line.strip()[:120]}"


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_short_launchers(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = [
        line for line in path.read_text().split("\n") if line.strip() and not line.lstrip().startswith("#")
    ]
    assert len(lines) <= 25


# Libraries whose interior the code relies on (an untried release may break it), and what the README calls them.
INTERIOR = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "open-clip-torch": "open_clip",
    "peft": "peft",
    "torch": "PyTorch",
    "transformers": "transformers",
    "trl": "TRL",
}


def requirements(project, extras):
    """What vlmamba with these extras asks of others; an extra may name extras."""
    for text in project["dependencies"] + [r for e in extras for r in project["optional-dependencies"][e]]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from requirements({**project, "dependencies": []}, requirement.extras)
        else:
            yield requirement


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").split()
    return {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lines)}


def test_versions_that_are_allowed_were_tried():
    """Each range of pyproject.toml begins at constraints-lowest.txt and ends at constraints.txt: both are tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest, newest = pins("constraints-lowest.txt"), pins("constraints.txt")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    interior = set()
    for requirement in requirements(project, ["dev"]):
        name = canonicalize_name(requirement.name)
        bounds = {s.operator: Version(s.version) for s in requirement.specifier}
        assert lowest[name] == bounds.get(">=", lowest[name]), f"{requirement}: {lowest[name]} is tried"
        assert newest[name] in requirement.specifier, f"{requirement}: {newest[name]} is tried"
        if name in INTERIOR:
            interior.add(name)
            after = Version(f"{newest[name].major}.{newest[name].minor + 1}")
            assert bounds["<"] == after, f"{requirement}: the newest that is tried is {newest[name]}"
            ends = dict.fromkeys((str(bounds[">="]), f"{newest[name].major}.{newest[name].minor}"))
            assert f"{INTERIOR[name]} {' to '.join(ends)}" in readme
    assert interior == set(INTERIOR)
