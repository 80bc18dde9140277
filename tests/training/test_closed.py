"""Checkpoints are closed and checked: nothing read runs code, damage has a name, a run folder has one writer."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from vlmamba.cli import main
from vlmamba.common.digests import DIGESTS
from vlmamba.common.files import digest
from vlmamba.common.load import load_model
from vlmamba.config import dump_yaml, load_recipe, load_yaml
from vlmamba.errors import CheckpointError, ConfigError, VLMambaError
from vlmamba.training import checkpoint as checkpoints
from vlmamba.training import loop
from vlmamba.training.checkpoint import latest_checkpoint, read_state, read_whole
from vlmamba.training.config import EvaluationConfig, TrainConfig
from vlmamba.training.init_from import init_from
from vlmamba.training.run import export_run, prepare_model, read_checkpoint, run
from vlmamba.training.sharded import MODEL, OPTIM, write_part

from .conftest import base_values


class Enough(Exception):
    """Ends a run on purpose."""


def stopped_run(config: TrainConfig, at: int) -> Path:
    real = loop.advance

    def advance(training: Any, *rest: Any) -> None:
        real(training, *rest)
        if training.state.step == at:
            raise Enough

    loop.advance = advance
    try:
        run(config)
    except Enough:
        return Path(config.output)
    finally:
        loop.advance = real
    raise AssertionError


def shard(checkpoint: Path) -> None:
    """Rewrite a checkpoint of one process as the shards of two, with their digests."""
    tensors, moments = read_whole(checkpoint)
    flat = {f"{MODEL}{name}": tensor for name, tensor in tensors.items()}
    flat |= {
        f"{OPTIM}{n}.{key}": torch.as_tensor(v) for n, each in moments.items() for key, v in each.items()
    }
    state, files = read_state(checkpoint), []
    for rank in (0, 1):
        part = {}
        for key, tensor in flat.items():
            half = -(-tensor.shape[0] // 2) if tensor.ndim else 0
            begin, end = (0, half) if not rank else (half, tensor.shape[0] if tensor.ndim else 0)
            if tensor.ndim and begin < end:
                start = [begin, *[0] * (tensor.ndim - 1)]
                part[key] = (tensor[begin:end].clone(), start, list(tensor.shape))
            elif not tensor.ndim and not rank:
                part[key] = (tensor, [], [])
        files.append(write_part(checkpoint, part, rank, 2))
    generators = torch.load(checkpoint / "rng.pt", weights_only=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    state.files = {f"shards/{file.name}": digest(file) for file in files}
    checkpoints.write_state(checkpoint, state, generators)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: Path, task: Path) -> dict[str, Path]:
    """A finished run, a stopped one and the same as shards; not to be written to."""
    root = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMAMBA_PROGRESS", "0")
        patch.setenv("VLMAMBA_CACHE", str(root / "cache"))
        for name in ("finished", "stopped"):
            config = TrainConfig.from_dict(base_values(weights, task, root / name))
            run(config) if name == "finished" else stopped_run(config, 3)
    shutil.copytree(root / "stopped", root / "sharded")
    shard(root / "sharded/checkpoints/step-000002")
    return {name: root / name for name in ("finished", "stopped", "sharded")}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """``copy("stopped")``: a run folder of its own."""

    def make(name: str) -> Path:
        target = tmp_path / "copies" / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folders[name], target)
        return target

    return make


# --- nothing runs -------------------------------------------------------------------------------------------


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()\nclass Evil:\n    pass\n"


def without_digests(folder: Path) -> None:
    """As an older version wrote it: nothing stands between a payload and its reader."""
    (folder / DIGESTS).unlink(missing_ok=True)
    for file in folder.rglob("state.json"):
        state = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in state.items() if k not in ("files", "sha256")}))


def old_shards(checkpoint: Path) -> Path:
    """Shards as torch.distributed.checkpoint writes them."""
    tensors, moments = read_whole(checkpoint)
    flat = {f"{MODEL}{name}": tensor for name, tensor in tensors.items()}
    flat |= {
        f"{OPTIM}{n}.{key}": torch.as_tensor(v) for n, each in moments.items() for key, v in each.items()
    }
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    dcp.save(flat, storage_writer=dcp.FileSystemWriter(checkpoint / "shards"), no_dist=True)
    without_digests(checkpoint)
    return checkpoint / "shards"


def poison_checkpoint(kind: str, checkpoint: Path, mark: Path) -> None:
    without_digests(checkpoint)
    if kind in ("optimizer.pt", "rng.pt", "model.safetensors"):
        torch.save({"a": Payload(mark)}, checkpoint / kind)
    elif kind == "state.json":
        (checkpoint / kind).write_bytes(pickle.dumps(Payload(mark)))
    elif kind == ".metadata":
        (old_shards(checkpoint) / kind).write_bytes(pickle.dumps(Payload(mark)))
    elif kind == ".distcp":
        folder = old_shards(checkpoint)
        with (folder / ".metadata").open("rb") as file:
            described = pickle.load(file)
        content = (folder / "__0_0.distcp").read_bytes()
        torch.save(Payload(mark), folder / "payload")
        payload = (folder / "payload").read_bytes()
        for place in described.storage_data.values():
            place.offset, place.length = len(content), len(payload)
        (folder / "__0_0.distcp").write_bytes(content + payload)
        (folder / ".metadata").write_bytes(pickle.dumps(described))
    elif kind == "config.yaml":
        yaml = f"!!python/object/apply:builtins.exec [\"open({str(mark)!r}, 'w').close()\"]\n"
        (checkpoint.parent.parent / kind).write_text(yaml)
        state = json.loads((checkpoint / "state.json").read_text())
        (checkpoint / "state.json").write_text(json.dumps({**state, "config": {}}))
    else:
        raise AssertionError(kind)


CHECKPOINT_KINDS = [
    "optimizer.pt",
    "rng.pt",
    "model.safetensors",
    "state.json",
    ".metadata",
    ".distcp",
    "config.yaml",
]
CHECKPOINT_DOORS = {
    "resume": lambda config, folder: run(config, resume=True),
    "export": lambda config, folder: export_run(folder),
    "load": lambda config, folder: load_model(folder),
    "init_from": lambda config, folder: init_from(prepare_model(config, torch.device("cpu"))[0], folder),
    "convert": lambda config, folder: main(["convert", str(folder), str(folder) + "-out"]),
    "check run": lambda config, folder: main(["check", "run", str(folder)]),
    "check language": lambda config, folder: main(["check", "language", str(folder)]),
}
EXPORT_DOORS = {
    "load": lambda folder: load_model(folder),
    "init_from": lambda folder: init_from(torch.nn.Linear(2, 2), folder),
    "convert": lambda folder: main(["convert", str(folder), str(folder) + "-out"]),
    "check run": lambda folder: main(["check", "run", str(folder)]),
    "check language": lambda folder: main(["check", "language", str(folder)]),
    "plan": lambda folder: main(["data", "check", "rows.json", "--processor", str(folder)]),
}


def try_door(door: Callable[..., Any], *arguments: Any) -> None:
    """Either it works without the payload, or it is refused in words."""
    try:
        door(*arguments)
    except SystemExit as ended:
        assert ended.code in (0, 1, 2)
    except VLMambaError:
        pass


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who says yes to whatever transformers asks."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.parametrize("kind", CHECKPOINT_KINDS)
def test_nothing_in_a_checkpoint_runs(
    kind: str, copy: Any, tmp_path: Path, willing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    for door, enter in CHECKPOINT_DOORS.items():
        folder = copy("stopped")
        config = load_yaml(folder / "config.yaml").replace(output=str(folder))
        poison_checkpoint(kind, folder / "checkpoints/step-000002", mark)
        try_door(enter, config, folder)
        assert not mark.exists(), (kind, door)
        shutil.rmtree(f"{folder}-out", ignore_errors=True)


def test_the_payload_is_one(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "ran"), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def poison_export(kind: str, export: Path, mark: Path) -> None:
    without_digests(export)
    (export / "evil.py").write_text(code(mark))
    (export / "custom_generate").mkdir()
    (export / "custom_generate/generate.py").write_text(code(mark))
    everything = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"), "evil.Evil"
    )
    everything |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"}
    if kind == "pytorch_model.bin":
        (export / "model.safetensors").unlink()
        torch.save({"a": Payload(mark)}, export / kind)
        return
    if kind == "chat_template.jinja":
        (export / kind).write_text(
            "{{ cycler.__init__.__globals__['__builtins__']['exec'](\"" + code(mark).splitlines()[0] + '") }}'
        )
        return
    name, _, part = kind.partition(":")
    content = json.loads((export / name).read_text())
    inner = content[part] if part else content
    inner["auto_map"] = everything
    for key in ("model_type", "tokenizer_class", "processor_class", "image_processor_type"):
        if key in inner:
            inner[key] = "Evil"
    (export / name).write_text(json.dumps(content))


EXPORT_KINDS = [
    "pytorch_model.bin",
    "chat_template.jinja",
    "config.json",
    "config.json:text_config",
    "config.json:vision_config",
    "tokenizer_config.json",
    "processor_config.json",
    "generation_config.json",
]


@pytest.mark.parametrize("kind", EXPORT_KINDS)
def test_nothing_in_an_export_runs(
    kind: str, copy: Any, task: Path, tmp_path: Path, willing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    monkeypatch.chdir(task)
    for door, enter in EXPORT_DOORS.items():
        export = copy("finished") / "export"
        poison_export(kind, export, mark)
        try_door(enter, export)
        assert not mark.exists(), (kind, door)
        shutil.rmtree(f"{export}-out", ignore_errors=True)


def test_old_shards_are_read(copy: Any, make_config: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint that torch.distributed.checkpoint wrote, without digests: one line of warning, the same tensors."""
    folder = copy("stopped")
    checkpoint = folder / "checkpoints/step-000002"
    wanted = read_whole(checkpoint)
    old_shards(checkpoint)
    found = read_whole(checkpoint)
    with caplog.at_level(logging.WARNING):
        assert run(load_yaml(folder / "config.yaml").replace(output=str(folder)), resume=True).step == 5
    assert len([r for r in caplog.records if "has no digests" in r.getMessage()]) == 1
    for name, tensor in wanted[0].items():
        assert torch.equal(found[0][name], tensor)
        assert all(torch.equal(found[1][name][key], value) for key, value in wanted[1][name].items())


# --- damage has a name ---------------------------------------------------------------------------------------

DAMAGES = ("flip", "cut", "zeros", "tail", "missing", "swapped")


def damage(file: Path, other: Path, how: str, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    size = len(content)
    at = draw.randrange(size)
    if how == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        content = content[:at]
    elif how == "zeros":
        length = min(size - at, draw.choice((1, 16, 512)))
        content[at : at + length] = bytes(length)
    elif how == "tail":
        content[at:] = bytes(size - at)
    if how == "missing":
        file.unlink()
    elif how == "swapped":
        content = bytearray(other.read_bytes())
        other.write_bytes(file.read_bytes())
    if how != "missing":
        file.write_bytes(content)


class Doors:
    """Loads a damaged folder as users do, and compares with what the whole one gives."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.wanted: dict[str, Any] = {}

    def read(self, folder: Path, name: str, file: Path) -> Any:
        """The result of the door behind a file."""
        inside = file.relative_to(folder).parts
        if inside[0] == "export":
            model, processor = load_model(folder)
            tokens = processor.tokenizer("What is the digit? <image>").input_ids
            described = [processor.chat_template, processor.image_processor.to_dict(), tokens]
            return {
                **model.state_dict(),
                "rest": json.dumps([described, model.config.to_dict()], default=str),
            }
        if inside[0] == "checkpoints" and len(inside) > 2:
            model, _, config = read_checkpoint(
                file if file.name.startswith("step-") else folder / Path(*inside[:2])
            )
            moments = read_whole(folder / Path(*inside[:2]))[1]
            flat = {f"{n}.{key}": torch.as_tensor(v) for n, m in moments.items() for key, v in m.items()}
            state = read_state(folder / Path(*inside[:2]))
            return {**model.state_dict(), **flat, "rest": repr((state, config.replace(output="x")))}
        config = load_yaml(self.folders[name] / "config.yaml").replace(output=str(folder))
        result = run(config, resume=True)
        newest = latest_checkpoint(result.run_dir)
        assert newest is not None
        return {**read_whole(newest)[0], "rest": result.step}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def damaged(folders: dict[str, Path], copy: Any, *, count: int, seed: int) -> Iterator[str]:
    """Damage files at random; yields what came of it: "error" or "same"."""
    draw, doors = random.Random(seed), Doors(folders)
    names = ("config.yaml", "environment.json", "log.jsonl")
    files = [
        (name, file.relative_to(root))
        for name, root in folders.items()
        for file in sorted(root.rglob("*"))
        if file.is_file()
        and (file.relative_to(root).parts[0] in ("checkpoints", "export") or file.name in names)
        and file.stat().st_size
        and (
            name != "finished" or file.relative_to(root).parts[0] == "export"
        )  # the rest is the stopped run's
    ]
    for _ in range(count):
        name, relative = draw.choice(files)
        _, other = draw.choice([f for f in files if f[0] == name and f[1] != relative])
        how = draw.choice(DAMAGES)
        folder = copy(name)
        where = (seed, name, str(relative), how, str(other))
        # What the whole folder gives, by the door of this file.
        key = (name, str(relative) if len(relative.parts) < 3 else relative.parts[:2])
        if key not in doors.wanted:
            doors.wanted[key] = doors.read(folder, name, folder / relative)
            folder = copy(name)
        damage(folder / relative, folder / other, how, draw)
        try:
            found = doors.read(folder, name, folder / relative)
        except VLMambaError as error:
            assert relative.name in str(error) or (how == "swapped" and other.name in str(error)), (
                where,
                error,
            )
            yield "error"
        else:
            assert same(found, doors.wanted[key]), where
            yield "same"


def test_random_damages(folders: dict[str, Path], copy: Any) -> None:
    outcomes = list(damaged(folders, copy, count=40, seed=12))
    assert outcomes.count("error") > 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_hundred_damages(folders: dict[str, Path], copy: Any) -> None:
    outcomes = list(damaged(folders, copy, count=500, seed=7))
    assert outcomes.count("error") > 300


def test_every_flip_of_the_state_is_seen(copy: Any) -> None:
    """JSON has no redundancy: a flipped digit of `step` is as good a number."""
    checkpoint = copy("stopped") / "checkpoints/step-000002"
    whole, wanted = (checkpoint / "state.json").read_bytes(), read_state(checkpoint)
    draw, errors = random.Random(3), 0
    for _ in range(400):
        content = bytearray(whole)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (checkpoint / "state.json").write_bytes(content)
        try:
            assert read_state(checkpoint) == wanted
        except CheckpointError as error:
            errors += "state.json" in str(error)
    assert errors > 250  # the others changed a space


def test_check_run_names_the_damage(copy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("finished")
    assert main(["check", "run", str(folder)]) == 0
    whole = capsys.readouterr().out
    assert "0 damaged" in whole and whole.count("as written") > 10
    for name in ("export/model.safetensors", "checkpoints/step-000004/rng.pt"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    (folder / "log.jsonl").write_text("{\n" + (folder / "log.jsonl").read_text())
    assert main(["check", "run", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "3 damaged" in out and "log.jsonl:1 is no line of a log" in out
    assert main(["check", "run", str(folder / "checkpoints/step-000005")]) == 0
    assert main(["check", "run", str(folder.parent)]) == 2


def test_deep_files_are_refused_in_words(copy: Any) -> None:
    folder = copy("stopped")
    config = load_yaml(folder / "config.yaml").replace(output=str(folder))
    (folder / "checkpoints/step-000002/state.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"state\.json is nested too deeply"):
        run(config, resume=True)
    (folder / "config.yaml").write_text("a: " + "[" * 20_000)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        run(config, resume=True)


def test_other_frozen_weights_are_not_loaded(
    copy: Any, weights: Path, tmp_path: Path, make_config: Any
) -> None:
    shutil.copytree(weights / "vision", tmp_path / "vision")
    folder = stopped_run(make_config({"model.vision.path": str(tmp_path / "vision")}), 3)
    assert load_model(folder)[0].training is False
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "vision/model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.fc1.weight"))
    save_file({**tensors, name: tensors[name] + 0.1}, tmp_path / "vision/model.safetensors", {"format": "pt"})
    for door in (load_model, export_run):
        with pytest.raises(CheckpointError, match="the frozen weights are not those that"):
            door(folder)


# --- one writer -----------------------------------------------------------------------------------------------


def _train(config: TrainConfig, at: Any, go_on: Any) -> None:
    real = loop.advance

    def advance(training: Any, *rest: Any) -> None:
        real(training, *rest)
        if training.state.step == 3:
            at.set()
            go_on.wait(60)

    loop.advance = advance
    run(config)


@pytest.mark.parametrize("ending", ["finished", "killed"])
def test_a_run_folder_has_one_writer(make_config: Any, ending: str) -> None:
    """The second start is refused and harms nothing; a lock ends with its process, not with its data workers."""
    config = make_config({"data.num_workers": 1, "save_every": 1})
    context = multiprocessing.get_context("fork")
    at, go_on = context.Event(), context.Event()
    first = context.Process(target=_train, args=(config, at, go_on))
    first.start()
    assert at.wait(60)
    before = {p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*") if p.name != ".lock"}
    for resume in (True, False):
        with pytest.raises(
            ConfigError,
            match=rf"the run folder .*run is in use by process {first.pid} on {os.uname().nodename}",
        ):
            run(config, resume=resume)
    assert before == {p: p.stat().st_mtime_ns for p in Path(config.output).rglob("*") if p.name != ".lock"}
    if ending == "killed":
        workers = Path(f"/proc/{first.pid}/task/{first.pid}/children")
        pids = [int(pid) for pid in workers.read_text().split()] if workers.exists() else []
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # the worker outlives the process and cannot end
        os.kill(first.pid, signal.SIGKILL)  # type: ignore[arg-type]
        first.join()
        try:
            assert run(config, resume=True).step == 5
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
    else:
        go_on.set()
        first.join(60)
        assert first.exitcode == 0
        assert run(config, resume=True).step == 5


def test_a_config_that_is_read_names_no_function_to_run(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's config.yaml is a recipe, too; its `evaluations` are admitted by a person."""
    (tmp_path / "measure.py").write_text("def blank(model, processor, *, step): return {}\n")
    file = tmp_path / "config.yaml"
    function = f"{tmp_path / 'measure.py'}:blank"
    file.write_text(dump_yaml(make_config().replace(evaluations=(EvaluationConfig(function=function),))))
    with pytest.raises(ConfigError, match=r"measure\.py:blank' is code from outside .* VLMAMBA_PLUGINS="):
        load_recipe(str(file))
    imported = file.read_text().replace(function, "subprocess:run")
    (tmp_path / "imported.yaml").write_text(imported)
    with pytest.raises(ConfigError, match="VLMAMBA_PLUGINS=subprocess"):
        load_recipe(str(tmp_path / "imported.yaml"))
    monkeypatch.setenv("VLMAMBA_PLUGINS", str(tmp_path / "measure.py"))
    recipe = load_recipe(str(file), ["--seed", "3"])
    assert recipe.config.evaluations[0].function == function
