"""``vlmamba ablate TABLE``: train, measure and draw a comparison; what is finished is never run again."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlmamba.ablations.table import FOLDER, Table, load_table
from vlmamba.cli.evaluate import add_switches, chosen_switches
from vlmamba.common.processes import EXIT_STOPPED
from vlmamba.config import names_in
from vlmamba.config.overrides import parse_overrides
from vlmamba.errors import ConfigError, VLMambaError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
EXAMPLES = """examples:
  vlmamba ablate                                             the tables there are
  vlmamba ablate vl_mamba_connectors --recipe playground     train, measure, report; again goes on where it stopped
  vlmamba ablate q_mamba_queries --dry-run                   the runs, what is shared, hours on 8 GPUs
  vlmamba ablate q_mamba_queries --slurm jobs/               array scripts for a cluster, and submit.sh
  vlmamba ablate my/table.py --rows "A,B" --seeds 1 --optim.lr 1e-3
"""


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    if words and words[0] == "speed":
        return _speed(words[1:])
    try:
        return _table(words)
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise VLMambaError(
            f"{error.strerror}: {error.filename}. What has finished is kept: make room, or name another folder with "
            "--store, and start the same command again."
        ) from error


def _table(words: Sequence[str]) -> int:
    arguments, rest = _parser().parse_known_args(words)
    if arguments.table is None:
        print("tables in eval/ablations/:")
        for name in names_in(arguments.folder):
            table = load_table(name, folder=arguments.folder)
            print(f"  {name:26} {table.title} ({len(table.shown)} rows, recipe {table.recipe})")
        return 0
    table = load_table(arguments.table, arguments.recipe, folder=arguments.folder)
    overrides = parse_overrides(rest)
    if overrides:
        table = dataclasses.replace(table, settings={**table.settings, **overrides})
    return _ablate(arguments, table, words)


def _ablate(arguments: argparse.Namespace, table: Table, words: Sequence[str]) -> int:
    from vlmamba.ablations.collect import collect, with_kinds
    from vlmamba.ablations.execute import Execution, Store, run_node
    from vlmamba.ablations.graph import expand, write_nodes
    from vlmamba.ablations.tables import format_rows

    store = Store(arguments.store or f"runs/ablations/{Path(table.recipe).stem}")
    graph = expand(table, store.root, seeds=arguments.seeds, rows=table.named(arguments.rows))
    if arguments.no_speed:
        graph = graph.without_speed()
    if arguments.dry_run:
        from vlmamba.ablations.estimate import describe_graph

        logging.getLogger("vlmamba").setLevel(logging.WARNING)
        print(describe_graph(table, graph, store, gpus=arguments.gpus, gpu=arguments.gpu))
        return 0
    if arguments.slurm:
        from vlmamba.ablations.slurm import write_arrays

        write_nodes(graph, store.root)
        script = write_arrays(graph, store, arguments.slurm, ["ablate", *words], options=arguments.sbatch)
        print(f"submit with: bash {script}")
        return 0
    if arguments.node:
        if arguments.node not in graph.nodes:
            raise ConfigError(
                f"table {arguments.table} has no node {arguments.node!r} (any more): its definition or files have "
                "changed since the scripts were written. Write them again with --slurm."
            )
        return run_node(graph, store, arguments.node, nproc=arguments.nproc)
    complete = True
    execution = Execution(graph, store, jobs=arguments.jobs, nproc=arguments.nproc, report=print_now)
    if not arguments.report_only:
        complete = execution.run()
    table = with_kinds(table)
    results = collect(table, graph, store)
    print(format_rows(table, results))
    from vlmamba.ablations.report import write_report

    target = Path(arguments.report) if arguments.report else store.root / "reports"
    command = shlex.join(["vlmamba", "ablate", *(word for word in words if word != "--report-only")])
    name = Path(arguments.table).stem
    page = write_report(table, results, graph, store, target, name=name, command=command)
    print(f"\nreport: {page}")
    if execution.stopped:
        print("stopped; the same command goes on")
        return EXIT_STOPPED
    return 0 if complete else 1


def print_now(line: str) -> None:
    """Print a line at once, also into a file."""
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlmamba ablate",
        description="Run a table of comparisons: every row and seed trained and measured, what rows share only once. "
        "Further flags are settings of all rows (--optim.lr 1e-3).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("table", nargs="?", help=f"name in {FOLDER}/ or path of a table's file")
    add(
        "--recipe",
        help="what to train the rows with: a recipe that the table knows (playground, vl_mamba, ...)",
    )
    add(
        "--rows", action="append", default=[], metavar="NAMES", help="only these, comma-separated; repeatable"
    )
    add("--seeds", type=_numbers, help="instead of the table's, comma-separated")
    add("--jobs", type=_positive, default=1, help="runs at a time on this machine (1)")
    add("--nproc", default="1", help="processes of each run, or auto: one a GPU (1)")
    add("--store", help="folder of the results, shared by tables (runs/ablations/RECIPE)")
    add("--report", help="folder of the report (STORE/reports)")
    add("--report-only", action="store_true", help="run nothing; report what is there")
    add(
        "--no-speed",
        action="store_true",
        help="do not time the trained models (do so later, on a quiet machine)",
    )
    add("--dry-run", action="store_true", help="the runs, what is shared, and how long it will take")
    add("--folder", default=FOLDER, help=argparse.SUPPRESS)
    group = parser.add_argument_group("clusters, and --dry-run")
    group.add_argument("--slurm", metavar="DIR", help="write array scripts and submit.sh into a folder")
    group.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="such as --sbatch=--gpus=8"
    )
    group.add_argument("--node", help="run one node, as the array scripts do")
    group.add_argument("--gpus", type=int, default=8, help="GPUs of a run, for the estimate (8)")
    group.add_argument("--gpu", default="A100", help="their name (A100)")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers separated by commas, got {text!r}") from error


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {text!r}")
    return int(text)


def _speed(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="vlmamba ablate speed", description="Time a trained model.")
    parser.add_argument("checkpoint", help="a finished run or an exported model")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--device", default="auto")
    add_switches(parser)
    arguments = parser.parse_args(words)
    from vlmamba.ablations.speed import measure_speed
    from vlmamba.common.files import replace_json

    values = measure_speed(arguments.checkpoint, chosen_switches(arguments), device=arguments.device)
    if arguments.output:
        replace_json(arguments.output, values)
    for name, value in values.items():
        print(f"{name:20} {value}")
    return 0
