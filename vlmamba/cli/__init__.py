"""The ``vlmamba`` command: one verb a file, imported when it is asked for.

Errors meant for users are printed without a traceback and give exit code 2; an interrupted command gives 130.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

from vlmamba import __version__
from vlmamba.common.progress import silence_others
from vlmamba.errors import VLMambaError

VERBS = {
    "train": "train a recipe: vlmamba train train/vl_mamba.py:pretrain --optim.lr 1e-3",
    "eval": "measure a checkpoint: vlmamba eval runs/quickstart/finetune --tasks playground",
    "chat": "talk with a checkpoint in the terminal",
    "inspect": "draw which patches mattered for an answer: vlmamba inspect runs/NAME --image X --question Q",
    "serve": "answer requests of OpenAI's chat-completions interface",
    "data": "check, show or count annotation files and their pictures: vlmamba data check FILE --images FOLDER",
    "plan": "memory, tokens and hours of a recipe: vlmamba plan train/vl_mamba.py:finetune --gpus 8",
    "ablate": "run a table of comparisons: vlmamba ablate vl_mamba_connectors --recipe playground",
    "report": "write a page with losses, scores and answers of finished runs",
    "check": "is a language model the same packed, padded, stepped, reloaded: vlmamba check language DIR",
    "convert": "convert checkpoints between layouts (transformers, state-spaces, LLaVA, Cobra)",
    "info": "versions, devices, scan backends (and why not), connectors, encoders, templates",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Words after ``vlmamba``; those of the process when left out.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="vlmamba",
        description="Train, compare and use vision-language models whose language model is Mamba.",
        epilog="\n".join(f"  {verb:9} {text}" for verb, text in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vlmamba {__version__}")
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help=", ".join(VERBS))
    if not words or words[0].startswith("-"):
        parser.parse_args(words or ["--help"])
    verb = parser.parse_args(words[:1]).verb
    silence_others()
    logging.basicConfig(
        level=os.environ.get("VLMAMBA_LOG", "INFO").upper(), format="%(message)s", stream=sys.stderr
    )
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "PIL"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show is shown by its codes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    command = importlib.import_module(f"vlmamba.cli.{'evaluate' if verb == 'eval' else verb}")
    levels = [(logger, logger.level) for logger in (logging.getLogger(), logging.getLogger("vlmamba"))]
    try:
        return int(command.run(words[1:]) or 0)
    except VLMambaError as error:
        print(f"vlmamba {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlmamba {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        for logger, level in levels:  # a verb may be quiet; whoever called it here is not
            logger.setLevel(level)
