"""A table on a cluster: one array of jobs for each wave of its graph, each after the one before."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmamba.ablations.execute import Store
from vlmamba.ablations.graph import Graph
from vlmamba.common.files import replace_text

SCRIPT = """\
#!/usr/bin/env bash
#SBATCH --job-name=ablate-{number}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="{wave}-%a.out"
#SBATCH --signal=B:USR1@300
{options}
cd {here} || exit 2
export PATH={programs}:"$PATH"
node=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {ids})
{command} --node "$node" --nproc auto &
run=$!
# USR1 comes 300 s before the time limit, TERM before a preemption: the run saves and exits with 75.
trap 'kill -TERM "$run"' USR1 TERM
while kill -0 "$run" 2> /dev/null; do wait "$run"; done # a signal ends a wait, not the run
wait "$run"
code=$?
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""
OWN_FLAGS = ("--slurm", "--sbatch", "--jobs", "--store", "--report")
"""Flags with a value that a task of an array does not get, or gets as a value of its own."""


def write_arrays(
    graph: Graph, store: Store, folder: str | Path, words: Sequence[str], *, options: Sequence[str] = ()
) -> Path:
    """Write ``wave-N.txt`` (ids of nodes), ``wave-N.sbatch`` and ``submit.sh``.

    Nodes that are done are left out. A wave starts when all of the one before have ended, well or not; what starts
    from a failed node then fails with a message. Before the time limit or a preemption a run saves, and its job is
    queued again and goes on. Jobs run in the folder and with the Python that this is called from.

    Args:
        graph: The runs.
        store: Their results, on a disk that all hosts see.
        folder: Where scripts go.
        words: The command line, after ``vlmamba``.
        options: Of sbatch, such as ``--gpus-per-node=8``.

    Returns:
        ``submit.sh``.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["vlmamba", *_kept(words), "--store", str(store.root)])
    submit = ["#!/usr/bin/env bash", "set -euo pipefail"]
    submit.append('here="$(cd "$(dirname "$0")" && pwd)"')
    before = False
    for number, wave in enumerate(graph.waves()):
        left = [node.id for node in wave if store.outcome(node.id) is None]
        if not left:
            continue
        replace_text(target / f"wave-{number}.txt", "\n".join(left) + "\n")
        replace_text(target / f"wave-{number}.sbatch", _script(number, target.resolve(), command, options))
        after = " --dependency=afterany:$job" if before else ""
        submit.append(
            f'job=$(sbatch --parsable --array=0-{len(left) - 1}{after} "$here/wave-{number}.sbatch")'
        )
        submit.append(f'echo "wave {number}: job $job, {len(left)} task(s)"')
        before = True
    last = f"when all have ended: {command} --report-only" if before else "everything is done"
    submit.append(f"echo {shlex.quote(last)}")
    path = target / "submit.sh"
    replace_text(path, "\n".join(submit) + "\n")
    return path


def _script(number: int, folder: Path, command: str, options: Sequence[str]) -> str:
    wave = folder / f"wave-{number}"
    given = "\n".join(f"#SBATCH {option}" for option in options)
    return SCRIPT.format(
        number=number, wave=wave, ids=shlex.quote(f"{wave}.txt"), options=given, command=command,
        here=shlex.quote(str(Path.cwd())), programs=shlex.quote(str(Path(sys.executable).parent)),
    )  # fmt: skip


def _kept(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        name = word.partition("=")[0]
        if skip:
            skip = False
        elif name in OWN_FLAGS:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept
