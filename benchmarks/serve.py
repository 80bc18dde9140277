"""``vlmamba serve`` under clients that mean harm: what honest ones wait, whether answers are whole, what memory does.

    python benchmarks/serve.py                          # 20 minutes, 100 clients
    python benchmarks/serve.py --minutes 1 --clients 50 --checkpoint runs/x/finetune

A server of its own on the loopback. Three of ten clients are honest: they ask one question after another, with and
without pictures, whole and streamed in turn, and every answer must be the one that the model gave before. In the first
third of every round they are alone (with one another); in the rest the others join: half-sent heads and bodies, idle
connections, bytes that are no HTTP, deep JSON, wrong fields, bodies beyond the limit, prompts of 200 KB, pictures that
claim 200 million pixels, broken pictures, readers that read a byte a second, and clients that leave while their answer
is written. Reported is what honest clients waited in both parts of the rounds, and the server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import functools
import io
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

LIMITS = {"read-seconds": 5, "body-bytes": 2_000_000, "prompt-tokens": 4096, "waiting": 200, "new-tokens": 24}


@dataclass
class Results:
    """What was seen."""

    alone: list[list[float]] = field(default_factory=list)
    """Seconds of each honest request, by round."""
    beside: list[list[float]] = field(default_factory=list)
    """The same beside the others."""
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the start, MiB."""
    wrong: list[str] = field(default_factory=list)
    """Honest requests that failed, or had another answer."""
    refused: dict[str, dict[str, int]] = field(default_factory=dict)
    """What the others got: kind -> status (or "closed") -> how often."""

    def ratios(self, of: Callable[[list[float]], float]) -> list[float]:
        """Waits beside the others over waits alone, by round."""
        return [of(b) / of(a) for a, b in zip(self.alone, self.beside, strict=True) if a and b]

    def growth(self) -> float:
        """The most memory of the last quarter over that of the second."""
        end = self.memory[-1][0]
        second = [m for at, m in self.memory if end / 4 <= at < end / 2]
        return max(m for at, m in self.memory if at >= 3 * end / 4) / max(second)


class Site:
    """The server's address, and requests to it by hand."""

    def __init__(self, port: int) -> None:
        self.port = port

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**20)
        try:
            yield reader, writer
        finally:
            writer.close()

    def head(self, length: int) -> bytes:
        """The head of a request with a body of so many bytes."""
        path = "/v1/chat/completions"
        return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()

    async def post(self, body: bytes) -> tuple[str, bytes]:
        """Status and body of the answer; "closed" where the server hung up."""
        with contextlib.suppress(ConnectionError):
            async with self.connection() as (reader, writer):
                writer.write(self.head(len(body)) + body)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                return split(await reader.read(-1))
        return "closed", b""


def split(answer: bytes) -> tuple[str, bytes]:
    """Status and body of an HTTP answer, its chunks joined."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ")[1].decode() if b" " in head else "closed"
    if b"transfer-encoding: chunked" in head.lower():
        joined = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            joined, body = joined + body[: int(size, 16)], body[int(size, 16) + 2 :]
        body = joined
    return status, body


def asked(text: str, *pictures: str, **options: Any) -> bytes:
    """The body of a request."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return json.dumps({"messages": messages, **options}).encode()


def answer_of(body: bytes, stream: bool) -> str:
    """The text of an answer."""
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert lines[-1] == b"[DONE]", lines[-1:]
    return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])


def data_url(picture: Image.Image) -> str:
    """A picture as PNG in a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def bomb() -> str:
    """A small PNG file whose header claims 14,000 x 14,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    side = (14_000).to_bytes(4, "big")
    lines = zlib.compress(bytes(14_000 * (1 + 14_000 // 8)), 9)
    header = chunk(b"IHDR", side + side + b"\1\0\0\0\0")
    file = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(file).decode()


@functools.cache
def harm() -> tuple[bytes, dict[str, bytes]]:
    """A request for the longest answer, and bodies of requests to be refused."""
    long = asked("Where?", stream=True)
    noise = data_url(Image.effect_noise((300, 300), 80))
    bodies = {
        "deep JSON": b'{"messages": ' + b"[" * 50_000,
        "wrong fields": asked("Where?", temperature=1e-40, max_tokens=0, n=True),
        "too large": b" " * (2 * int(LIMITS["body-bytes"])),
        "long prompt": asked("a b c d " * 25_000),
        "huge picture": asked("Where?", bomb()),
        "broken picture": asked("Where?", noise[: len(noise) // 2 // 4 * 4]),
    }
    return long, bodies


async def hostile(site: Site, kind: str, draw: random.Random) -> str:
    """One visit of a client that means harm; what came of it."""
    long, bodies = harm()
    if kind in bodies:
        return (await site.post(bodies[kind]))[0]
    with contextlib.suppress(ConnectionError):
        async with site.connection() as (reader, writer):
            if kind == "slow reader":
                writer.write(site.head(len(long)) + long)
                for _ in range(5):
                    await reader.read(1)
                    await asyncio.sleep(1)
                return "left"
            if kind == "leaves":
                body = long if draw.random() < 0.5 else long.replace(b"true", b"false")
                writer.write(site.head(len(body)) + body)
                await asyncio.sleep(draw.uniform(0.05, 1))
                return "left"
            writer.write(
                {
                    "idle": b"",
                    "half a head": site.head(100)[:40],
                    "half a body": site.head(100_000) + b" " * 50_000,
                    "no HTTP": b"\x16\x03\x01" + draw.randbytes(200),
                }[kind]
            )
            return split(await reader.read(-1))[0]
    return "closed"


KINDS = (
    "deep JSON", "wrong fields", "too large", "long prompt", "huge picture", "broken picture", "slow reader", "leaves",
    "idle", "half a head", "half a body", "no HTTP",
)  # fmt: skip


async def load(site: Site, pid: int, *, seconds: float, rounds: int, clients: int, seed: int = 0) -> Results:
    """Honest and other clients for a time.

    Args:
        site: The server.
        pid: Its process.
        seconds: How long.
        rounds: Of a part with honest clients alone and one with all.
        clients: In all.
        seed: Of what the clients do.
    """
    harm()
    results, began, draw = Results(), time.monotonic(), random.Random(seed)
    picture = data_url(Image.effect_noise((96, 96), 80))
    questions = [("Where is it?", ()), ("What is in the image?", (picture,)), ("Which?", (picture, picture))]
    bodies = [
        (asked(text, *pictures, stream=stream), stream)
        for text, pictures in questions
        for stream in (False, True)
    ]
    right = [answer_of((await site.post(body))[1], stream) for body, stream in bodies]
    if right[::2] != right[1::2]:
        results.wrong.append(f"streamed answers differ from whole ones: {right}")
    now: list[list[float]] = []
    stop = asyncio.Event()

    async def honest(at: int) -> None:
        for number in itertools.count(at):
            if stop.is_set():
                return
            body, stream = bodies[number % len(bodies)]
            since, into = time.monotonic(), now[-1]
            status, answer = await site.post(body)
            into.append(time.monotonic() - since)
            if status != "200" or answer_of(answer, stream) != right[number % len(bodies)]:
                results.wrong.append(f"{status} {answer[:200]!r}")
            await asyncio.sleep(0.05)

    async def other(at: int, until: float) -> None:
        own = random.Random(f"{seed}-{at}")
        while time.monotonic() < until:
            kind = KINDS[at % len(KINDS)]
            with contextlib.suppress(asyncio.TimeoutError):
                outcome = "timed out"
                async with asyncio.timeout(until + 20 - time.monotonic()):
                    outcome = await hostile(site, kind, own)
            found = results.refused.setdefault(kind, {})
            found[outcome] = found.get(outcome, 0) + 1
            at += len(KINDS) // 5  # another kind each time
            await asyncio.sleep(own.uniform(0.5, 2))

    async def watch() -> None:
        while not stop.is_set():
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]
            results.memory.append((time.monotonic() - began, int(kilobytes) / 1024))
            await asyncio.sleep(min(1.0, seconds / 100))

    many = max(1, clients * 3 // 10)
    now.append([])
    tasks: list[Awaitable[None]] = [asyncio.create_task(honest(at)) for at in range(many)]
    tasks.append(asyncio.create_task(watch()))
    part = seconds / rounds
    for _ in range(rounds):
        now.append([])
        results.alone.append(now[-1])
        await asyncio.sleep(part / 3)
        now.append([])
        results.beside.append(now[-1])
        until = time.monotonic() + part * 2 / 3
        await asyncio.gather(*(other(draw.randrange(len(KINDS)), until) for _ in range(clients - many)))
    stop.set()
    await asyncio.gather(*tasks)
    return results


@contextlib.contextmanager
def server(checkpoint: Path) -> Any:
    """A server's address and process, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    limits = [word for name, value in LIMITS.items() for word in (f"--max-{name}", str(value))]
    words = [
        sys.executable,
        "-m",
        "vlmamba",
        "serve",
        str(checkpoint),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen([*words, *limits], stdout=log, stderr=log) as process,
    ):
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode())
                time.sleep(0.1)
            yield Site(port), process.pid
        finally:
            process.terminate()


def measure(
    checkpoint: Path | None, *, seconds: float, rounds: int, clients: int
) -> tuple[Results, dict[str, Any]]:
    """Run the load; what was seen, and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            from vlmamba.testing import tiny_model

            model, processor = tiny_model()
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        with server(checkpoint or Path(folder)) as (site, pid):
            os.nice(5)  # clients of a real server run elsewhere
            seen = asyncio.run(load(site, pid, seconds=seconds, rounds=rounds, clients=clients))
    alone, beside = ([w for part in parts for w in part] for parts in (seen.alone, seen.beside))
    figures = {
        "seconds": seconds,
        "clients": clients,
        "honest requests": len(alone) + len(beside),
        "honest requests that failed or differ": len(seen.wrong),
        "median wait alone, s": statistics.median(alone),
        "median wait beside the others, s": statistics.median(beside),
        "longest wait alone, s": max(alone),
        "longest wait beside the others, s": max(beside),
        "longest wait over longest alone, median of rounds": statistics.median(seen.ratios(max)),
        "longest wait over longest alone, worst round": max(seen.ratios(max)),
        "memory, MiB: first, most, last": [
            seen.memory[0][1],
            max(m for _, m in seen.memory),
            seen.memory[-1][1],
        ],
        "memory of the last quarter over that of the second": seen.growth(),
        "the others": seen.refused,
    }
    return seen, figures


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="vlmamba serve under hostile load.", allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, help="a run or an export (default: a tiny fresh model)")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=100)
    given = parser.parse_args(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seen, figures = measure(
        given.checkpoint, seconds=60 * given.minutes, rounds=given.rounds, clients=given.clients
    )
    print(json.dumps(figures, indent=1, default=lambda value: round(value, 3)))
    for wrong in seen.wrong[:5]:
        print(f"! {wrong}", file=sys.stderr)
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
