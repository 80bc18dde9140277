"""``vlmamba serve CHECKPOINT``: a checkpoint behind OpenAI's chat-completions interface."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    from vlmamba.integrations.openai_server import Limits, serve

    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="vlmamba serve",
        description="Answer requests of OpenAI's chat-completions interface (POST /v1/chat/completions), whole or "
        "streamed, pictures as data URLs. There is no authentication: keep it on this host or behind a proxy.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="a finished run (runs/NAME) or an exported model directory")
    add("--name", help="what clients call the model (default: the checkpoint's folder)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this host only)")
    add("--port", type=int, default=8000)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", default="auto", help="auto (bfloat16 on a GPU), float32, bfloat16 or float16")
    add("--max-new-tokens", type=int, default=limits.new_tokens, help="longest answer (default: %(default)s)")
    add("--max-images", type=int, default=limits.images, help="pictures of a request (default: %(default)s)")
    add("--max-bytes", type=int, default=limits.body_bytes, help="size of a request (default: %(default)s)")
    add(
        "--max-waiting",
        type=int,
        default=limits.waiting,
        help="requests that may wait (default: %(default)s)",
    )
    arguments = parser.parse_args(words)
    from vlmamba.integrations.asking import Answerer

    answerer = Answerer.load(arguments.checkpoint, device=arguments.device, dtype=arguments.dtype)
    name = arguments.name or Path(arguments.checkpoint).resolve().name
    print(f"{name} on http://{arguments.host}:{arguments.port}/v1")
    serve(
        answerer,
        name=name,
        host=arguments.host,
        port=arguments.port,
        limits=Limits(
            arguments.max_bytes, arguments.max_images, arguments.max_new_tokens, arguments.max_waiting
        ),
    )
    return 0
