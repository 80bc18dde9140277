"""``vlmamba inspect CHECKPOINT --image X --question Q``: which patches mattered for each token of the answer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmamba.errors import ConfigError


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    from vlmamba.common.load import load_model
    from vlmamba.interpret.answers import answer_question
    from vlmamba.interpret.methods import METHODS, check_method, methods_of
    from vlmamba.interpret.report import make_maps, write_inspection

    parser = argparse.ArgumentParser(
        prog="vlmamba inspect",
        description="Answer a question and draw which patches mattered for each token of the answer.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a finished run (runs/NAME) or an exported model directory")
    parser.add_argument("--image", action="append", default=[], help="picture of the question (repeatable)")
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", default="all", help="which answer token, from 0; all (default)")
    parser.add_argument(
        "--method", default="all", choices=["all", *METHODS], help="all (default): side by side"
    )
    parser.add_argument(
        "--layer", help="hidden attention of one layer of the language model, or of each (all)"
    )
    parser.add_argument("--output", default="inspect", help="folder for index.html, PNGs and maps.json")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arguments = parser.parse_args(words)
    token = None if arguments.answer == "all" else _number("--answer", arguments.answer)
    model, processor = load_model(arguments.checkpoint, device=arguments.device, dtype="float32")
    images = [processor.image_processor.open(Path(path).expanduser()) for path in arguments.image]
    methods = methods_of(model) if arguments.method == "all" else [arguments.method]
    layers: list[int] = []
    if arguments.layer is not None:
        number = model.config.text_config.num_hidden_layers
        layers = list(range(number)) if arguments.layer == "all" else [_number("--layer", arguments.layer)]
    for method in methods:
        check_method(model, method)
    for layer in layers:
        check_method(model, arguments.method.replace("all", "hidden-attention"), layer=layer)
    answer = answer_question(
        model, processor, images, arguments.question, max_new_tokens=arguments.max_new_tokens
    )
    maps = make_maps(model, answer, tokens=None if token is None else [token], methods=methods, layers=layers)
    page = write_inspection(arguments.output, answer, maps, processor, checkpoint=str(arguments.checkpoint))
    print(answer.text)
    for index, text in enumerate(answer.tokens):
        print(f"  token {index}: {text!r}")
    print(f"{len(maps)} maps: {page}")
    return 0


def _number(flag: str, word: str) -> int:
    if not word.isdecimal():
        raise ConfigError(f"{flag} is {word!r}; it must be a number from 0 or 'all'")
    return int(word)
