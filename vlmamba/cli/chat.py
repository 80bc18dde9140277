"""``vlmamba chat CHECKPOINT``: a conversation in the terminal, images by path, answers as they are written.

A path typed, pasted or dragged into the line (quoted, escaped, or as ``file://`` URL) becomes an image of that turn.
"""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import VLMambaError

HELP = """\
Type a question. A path to a picture anywhere in the line (drag the file in) shows it to the model.
  /image PATH   show a picture with the next question
  /new          forget the conversation
  /system TEXT  begin again with a system message
  /help         this text
  /exit         leave (also Ctrl-D)"""


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    parser = argparse.ArgumentParser(
        prog="vlmamba chat", description="Talk with a model.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="a finished run (runs/NAME) or an exported model directory")
    parser.add_argument(
        "--image", action="append", default=[], help="picture for the first question (repeatable)"
    )
    parser.add_argument("--question", help="ask this once, print the answer and leave")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): always the likeliest token"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    arguments = parser.parse_args(words)
    from vlmamba.integrations.asking import Answerer

    answerer = Answerer.load(arguments.checkpoint, device=arguments.device)
    session = Session(answerer, max_new_tokens=arguments.max_new_tokens, temperature=arguments.temperature)
    session.show(*arguments.image)
    if arguments.question is not None:
        session.ask(arguments.question)
        return 0
    print(HELP)
    while True:
        try:
            line = input("\nyou> ").strip()
        except EOFError:
            print()
            return 0
        if line in ("/exit", "/quit"):
            return 0
        try:
            session.handle(line)
        except VLMambaError as error:
            print(f"! {error}")


class Session:
    """A conversation.

    Args:
        answerer: The checkpoint (`vlmamba.integrations.asking.Answerer`).
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.

    Attributes:
        turns: Role, and pictures and text, of each turn so far.
        pending: Pictures that go with the next question.
    """

    def __init__(self, answerer: Any, *, max_new_tokens: int, temperature: float) -> None:
        self.answerer = answerer
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else None
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
        self.turns: list[tuple[str, list[Any]]] = []
        self.pending: list[Any] = []

    def handle(self, line: str) -> None:
        """One line of the user: a command or a question."""
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command == "/help":
            print(HELP)
        elif command == "/new":
            self.turns, self.pending = [], []
            print("(a new conversation)")
        elif command == "/system":
            self.turns, self.pending = [("system", [rest])], []
            print("(a new conversation)")
        elif command == "/image":
            self.show(_path_of(rest))
            print(f"({_size(self.pending[-1])}; it goes with your next question)")
        elif command.startswith("/") and not _looks_like_picture(command):
            print(f"! unknown command {command}; /help lists the commands")
        else:
            text, paths = split_paths(line)
            self.show(*paths)
            if text:
                self.ask(text)
            else:
                print("(picture taken; it goes with your next question)")

    def show(self, *paths: str) -> None:
        """Open pictures that go with the next question, as training opens its own.

        Raises:
            ImageError: There is none, or it cannot be read.
        """
        self.pending += [
            self.answerer.processor.image_processor.open(Path(path).expanduser()) for path in paths
        ]

    def ask(self, text: str) -> str:
        """Ask, print the answer while it comes, and remember both."""
        from vlmamba.integrations.asking import Request

        turns = [*self.turns, ("user", [*self.pending, text])]
        question = self.answerer.encode(Request.of(turns))
        answer: str = self.answerer.write(
            question, **self.options, on_text=functools.partial(print, end="", flush=True)
        ).text
        print()
        self.turns, self.pending = [*turns, ("assistant", [answer])], []
        return answer


def split_paths(line: str) -> tuple[str, list[str]]:
    """Take the paths of existing pictures out of a line.

    Returns:
        What is left of the line, and the paths in order.
    """
    paths = []
    rest = []
    # A word may be quoted or hold escaped spaces, as terminals paste a dragged file.
    for word in re.findall(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s'"\\])+|\S""", line):
        path = _path_of(word)
        if _looks_like_picture(path):
            paths.append(path)
        else:
            rest.append(word)
    return (" ".join(rest) if paths else line), paths


def _path_of(word: str) -> str:
    text = word.strip()
    try:
        parts = shlex.split(text)
    except ValueError:
        parts = [text]
    path = parts[0] if len(parts) == 1 else text
    if path.startswith("file://"):
        path = urllib.parse.unquote(urllib.parse.urlparse(path).path)
    return path


def _looks_like_picture(path: str) -> bool:
    from vlmamba.common.images import SUFFIXES

    return path.lower().endswith(SUFFIXES) and Path(path).expanduser().is_file()


def _size(picture: Any) -> str:
    return f"{picture.width} x {picture.height} pixels"
