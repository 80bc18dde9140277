"""``vlmamba train RECIPE``: train, or show what would be trained.

Exit codes: 0 finished; 2 an error that the message explains; 75 stopped on request after saving, start again with
--resume; 74 nothing moved for too long.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from vlmamba.common.processes import EXIT_STOPPED, read_launch, spawn_asked
from vlmamba.config import describe, dump_yaml, load_recipe, names_in
from vlmamba.errors import VLMambaError
from vlmamba.training.config import TrainConfig


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba train",
        description="Train a recipe. Further flags are dotted overrides (--optim.lr 1e-5) or keyword arguments of "
        "the recipe's function (--connector qmamba).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help="train/NAME.py:FUNCTION, NAME:FUNCTION, or the config.yaml of a run, to repeat it",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in its output folder")
    parser.add_argument(
        "--force", action="store_true", help="with --resume: go on though settings differ, and name them"
    )
    parser.add_argument(
        "--nproc",
        metavar="N",
        default=os.environ.get("NPROC", "1"),
        help="processes on this host, or auto: one a GPU; several hosts by NNODES, NODE_RANK, MASTER_ADDR (default: "
        "$NPROC or 1; torchrun, srun, accelerate launch and deepspeed work as well)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="sizes, steps and missing files; needs no weights"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config as YAML")
    parser.add_argument("--help-config", action="store_true", help="print every setting and what it means")
    arguments, overrides = parser.parse_known_args(words)
    if arguments.help_config:
        print(describe(TrainConfig))
        return 0
    if arguments.recipe is None:
        parser.error(f"name a recipe; in train/ there are: {', '.join(names_in('train')) or 'none'}")
    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.print_config:
        print(dump_yaml(recipe.config), end="")
        return 0
    if not arguments.dry_run and (code := spawn_asked(words, arguments.nproc, verb="train")) is not None:
        return code
    rank = read_launch().rank
    if rank:
        logging.getLogger().setLevel(logging.WARNING)
    else:
        print(f"recipe {recipe.path}{':' + recipe.function if recipe.function else ''}")
        for change in recipe.changes:
            print(f"  {change}")
    if arguments.dry_run:
        from vlmamba.training.dry_run import dry_run

        print(dry_run(recipe.config))
        return 0
    return _train(recipe.config, resume=arguments.resume, force=arguments.force)


def _train(config: TrainConfig, *, resume: bool, force: bool) -> int:
    from vlmamba.training.run import run as train

    launch = read_launch()
    try:
        result = train(config, resume=resume, force=force)
    except Exception as error:
        if launch.world_size == 1:
            raise
        _leave(error, launch.rank)
    if result.export is not None:
        if not launch.rank:
            print(f"done: {result.step} steps; the model is in {result.export}")
        return 0
    if not launch.rank:
        print(f"stopped at step {result.step}; continue with the same command and --resume")
    return EXIT_STOPPED


def _leave(error: Exception, rank: int) -> NoReturn:
    """End one of several processes at once: the others may hang, and waiting for them at exit would too."""
    known = isinstance(error, VLMambaError)
    text = f"vlmamba train: rank {rank}: {error}\n" if known else "".join(traceback.format_exception(error))
    sys.stderr.write(text if known else "".join(f"rank {rank}: {line}" for line in text.splitlines(True)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if known else 1)
