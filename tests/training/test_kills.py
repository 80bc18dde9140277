"""SIGKILL at random moments: the run always goes on from a complete checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmamba.config import dump_yaml
from vlmamba.training.checkpoint import latest_checkpoint
from vlmamba.training.config import TrainConfig
from vlmamba.training.metrics import read_log

MakeConfig = Callable[..., TrainConfig]

# Imports once, then a forked child for every life of the run. Prints one JSON object a life.
PROGRAM = """
import json, os, random, signal, sys, time
import torch
from pathlib import Path
from vlmamba.config import load_yaml
from vlmamba.training.checkpoint import latest_checkpoint
from vlmamba.training.run import run

torch.set_num_threads(1)
config, kills, seed = load_yaml(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)

def life(limit):
    child = os.fork()
    if not child:
        try:
            run(config, resume=True)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
        os._exit(0)
    began = time.monotonic()
    while limit is None or time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began

killed, whole = 0, None
config = config.replace(output=sys.argv[4] + "/whole")
code, whole = life(None)
assert code == 0, "the uninterrupted run failed"
finished = 0
while killed < kills:
    config = config.replace(output=f"{sys.argv[4]}/killed-{finished}")
    # Anywhere in a whole life, but mostly early, so that a run is killed many times before it ends.
    code, took = life(draw.uniform(0, 1) ** 1.5 * whole)
    newest = latest_checkpoint(Path(config.output))
    print(json.dumps({"code": code, "took": took, "at": newest and newest.name, "run": finished}), flush=True)
    if code == 0:
        finished += 1
    elif code == -signal.SIGKILL:
        killed += 1
    else:
        sys.exit(1)
config = config.replace(output=f"{sys.argv[4]}/killed-{finished}")
print(json.dumps({"code": life(None)[0], "run": finished}), flush=True)
"""


@pytest.mark.parametrize(
    ("kills", "save_async"),
    [
        pytest.param(3, False, marks=pytest.mark.ci),
        pytest.param(50, False, marks=pytest.mark.slow),
        pytest.param(50, True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(3600)
def test_random_kills(make_config: MakeConfig, tmp_path: Path, kills: int, save_async: bool) -> None:
    """Model, data, checkpoint writing and export included; bit-equal at the end."""
    config = make_config({"save_every": 1, "epochs": 3, "save_async": save_async, "data.num_workers": 1})
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.yaml"), str(kills), "11", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLMAMBA_SSM_BACKEND": "torch"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sum(life["code"] == -signal.SIGKILL for life in lives) == kills
    assert lives[-1]["code"] == 0
    wanted = _final(tmp_path / "whole")
    for number in {life["run"] for life in lives}:
        found = _final(tmp_path / f"killed-{number}")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(tensor, found[name]), (number, name)
        assert _losses(tmp_path / f"killed-{number}") == _losses(tmp_path / "whole")
        folder = tmp_path / f"killed-{number}"
        assert not [p for p in folder.rglob(".*") if p.name.endswith((".tmp", ".old"))]


def _final(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(run_dir)
    assert newest is not None and newest.name == "step-000015"
    return {
        **load_file(newest / "model.safetensors"),
        **{f"export/{n}": t for n, t in load_file(run_dir / "export" / "model.safetensors").items()},
    }


def _losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(run_dir / "log.jsonl")]
