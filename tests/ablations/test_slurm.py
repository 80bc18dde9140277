import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vlmamba.ablations.execute import Outcome, Store
from vlmamba.ablations.graph import expand
from vlmamba.ablations.slurm import write_arrays

SBATCH = """#!/usr/bin/env bash
# Runs the tasks of an array at once, one after another, and prints a job's number as sbatch --parsable does.
echo "$@" >> "$LOG"
for word in "$@"; do case "$word" in --array=*) range="${word#--array=0-}" ;; *.sbatch) script="$word" ;; esac; done
for i in $(seq 0 "$range"); do SLURM_ARRAY_TASK_ID=$i bash "$script" >> "$LOG.out"; done
echo 1234
"""
VLMAMBA = """#!/usr/bin/env bash
echo "vlmamba $@"
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A PATH with an sbatch and a vlmamba that write down what they were asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "vlmamba": VLMAMBA}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}


def test_every_node_is_a_task_of_the_wave_after_those_it_needs(table, tmp_path, stubs):
    graph, store = expand(table, "store"), Store("store")
    words = [
        "ablate",
        "tiny",
        "--jobs",
        "3",
        "--slurm=jobs",
        "--rows",
        "A B",
        "--store",
        "x",
        "--sbatch=--gpus=8",
    ]
    script = write_arrays(graph, store, "jobs", words, options=["--gpus=8"])
    done = subprocess.run(["bash", str(script)], env=stubs, check=True, capture_output=True, text=True)
    asked = (tmp_path / "log.out").read_text().splitlines()
    order = [line.split("--node ")[1].split()[0] for line in asked]
    assert sorted(order) == sorted(graph.nodes)
    for node in graph.nodes.values():
        assert all(order.index(n) < order.index(node.id) for n in node.needs)
    assert asked[0].startswith("vlmamba ablate tiny --rows A B --store store --node train-")
    calls = (tmp_path / "log").read_text().splitlines()
    assert "--dependency" not in calls[0] and "--dependency=afterany:1234" in calls[1]
    assert "#SBATCH --gpus=8" in Path("jobs/wave-0.sbatch").read_text()
    assert "vlmamba ablate tiny --rows 'A B' --store store --report-only" in done.stdout


def test_finished_nodes_are_left_out(table):
    graph, store = expand(table, "store"), Store("store")
    for node_id in graph.nodes:
        store.record(Outcome(node_id, "", "", 0, 1.0, 0, None))
    script = write_arrays(graph, store, "jobs", ["ablate", "tiny"])
    assert "everything is done" in script.read_text()
    assert not list(Path("jobs").glob("*.sbatch"))


@pytest.mark.parametrize("number", ["USR1", "TERM"])
def test_a_job_whose_time_ends_lets_its_run_save_and_is_queued_again(table, tmp_path, stubs, number):
    """The script, its run asked to end while it saves."""
    (tmp_path / "bin" / "vlmamba").write_text(
        "#!/usr/bin/env bash\ntrap 'sleep 0.5; echo saved; exit 75' TERM\nsleep 0.3\necho started\n"
        "while true; do sleep 0.05; done\n"
    )
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/usr/bin/env bash\necho scontrol $@\n")
    scontrol.chmod(0o755)
    write_arrays(expand(table, "store"), Store("store"), "jobs", ["ablate", "tiny"])
    elsewhere = {**stubs, "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(
        ["bash", str(Path("jobs/wave-0.sbatch").resolve())],
        env=elsewhere,
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(getattr(signal, f"SIG{number}"))
    rest, _ = process.communicate(timeout=30)
    assert rest.splitlines() == ["saved", "scontrol requeue 77"]
    assert process.returncode == 75


def test_a_job_runs_where_the_table_was_defined_with_the_same_python(table, tmp_path, stubs):
    (tmp_path / "bin" / "vlmamba").write_text("#!/usr/bin/env bash\npwd\nexit 3\n")
    write_arrays(expand(table, "store"), Store("store"), "jobs", ["ablate", "tiny"])
    plain = {
        **os.environ,
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_ID": "77",
    }  # an environment that was not activated
    script = Path("jobs/wave-0.sbatch").resolve()
    done = subprocess.run(
        ["bash", str(script)], env=plain, cwd="/", capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.returncode) == (str(Path.cwd()), 3)
