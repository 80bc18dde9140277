"""``vlmamba serve CHECKPOINT``: a checkpoint behind OpenAI's chat-completions interface."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from vlmamba.errors import require

KEY = "VLMAMBA_API_KEY"


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    for package in ("pydantic", "starlette", "uvicorn"):
        require(package, extra="serve", feature="vlmamba serve")
    from vlmamba.integrations.openai_server import Limits, serve

    parser = argparse.ArgumentParser(
        prog="vlmamba serve",
        description="Answer requests of OpenAI's chat-completions interface (POST /v1/chat/completions), whole or "
        f"streamed, pictures as data URLs. Where the environment has {KEY}, clients must show it "
        "(Authorization: Bearer KEY).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="a finished run (runs/NAME) or an exported model directory")
    add("--name", help="what clients call the model (default: the checkpoint's folder)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this host only)")
    add("--port", type=int, default=8000)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", help="auto (bfloat16 on a GPU), float32, bfloat16 or float16")
    limits = parser.add_argument_group("limits")
    for one in dataclasses.fields(Limits):
        limits.add_argument(
            f"--max-{one.name.replace('_', '-')}",
            dest=one.name,
            type=type(one.default),
            default=one.default,
            metavar="N",
            help=f"{one.metadata['help']} (default: {one.default:,})",
        )
    arguments = vars(parser.parse_args(words))
    from vlmamba.integrations.asking import Answerer

    checkpoint = arguments["checkpoint"]
    answerer = Answerer.load(checkpoint, device=arguments["device"], dtype=arguments["dtype"])
    name = arguments["name"] or Path(checkpoint).resolve().name
    print(f"{name} on http://{arguments['host']}:{arguments['port']}/v1", flush=True)
    serve(
        answerer,
        name=name,
        host=arguments["host"],
        port=arguments["port"],
        limits=Limits(**{one.name: arguments[one.name] for one in dataclasses.fields(Limits)}),
        key=os.environ.get(KEY) or None,
    )
    return 0
