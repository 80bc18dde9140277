"""A checkpoint behind OpenAI's chat-completions interface, for clients and harnesses that speak it.

``GET /v1/models``, ``GET /health`` and ``POST /v1/chat/completions``, whole or streamed as server-sent events
(https://platform.openai.com/docs/api-reference/chat). Pictures come as data URLs; nothing is loaded from elsewhere.

What clients send is not trusted. A request's body is read, then checked (fields by pydantic, pictures by their headers,
the prompt by its tokens), then waits its turn, then is answered, one at a time; each phase has its `Limits`. Only
reading is done on the event loop. A client that goes away is forgotten at once, whatever its request was waiting for.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlmamba.common.images import from_base64, image_size
from vlmamba.errors import ConfigError, ImageError, VLMambaError
from vlmamba.evaluation.generation import Question
from vlmamba.evaluation.runner import out_of_memory_is_none
from vlmamba.integrations.asking import Answerer, Completion, Request

log = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 32
"""Text longer than this for every token allowed is refused before it is tokenised."""


def _limit(default: float, says: str) -> Any:
    return field(default=default, metadata={"help": says})


@dataclass(frozen=True)
class Limits:
    """What requests may cost; every field is an option of ``vlmamba serve``."""

    body_bytes: int = _limit(32 * 2**20, "of a request as sent, pictures included")
    held_bytes: int = _limit(512 * 2**20, "of all requests that are being read or wait")
    images: int = _limit(16, "pictures of a request")
    pixels: int = _limit(64_000_000, "of a request's pictures together, by their headers")
    prompt_tokens: int = _limit(8192, "of a request's text and pictures together")
    new_tokens: int = _limit(2048, "longest answer; what asks for more gets this, and finish_reason length")
    waiting: int = _limit(32, "requests that may wait or be answered at the same time")
    read_seconds: float = _limit(30.0, "for a client to send its request")
    wait_seconds: float = _limit(300.0, "that a request may wait for its turn")
    write_seconds: float = _limit(300.0, "for an answer, which then ends with finish_reason length")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Address(_Strict):
    url: str
    detail: Literal["auto"] = "auto"


class _Picture(_Strict):
    type: Literal["image_url"]
    image_url: _Address


class _Message(_Strict):
    role: str
    content: (
        str | Annotated[list[Annotated[_Text | _Picture, Field(discriminator="type")]], Field(min_length=1)]
    )


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Format(_Strict):
    type: Literal["text"]


def _warm(temperature: float) -> float:
    if 0 < temperature < 0.01:
        raise ValueError("a temperature is 0 (the likeliest token) or at least 0.01")
    return temperature


Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]


class _Body(_Strict):
    """A request: what is offered, and of what is not, the values that ask for nothing."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_warm)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        str
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
        | None
    ) = None
    user: str | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Literal[False] | None = None
    store: Literal[False] | None = None
    response_format: _Format | None = None
    tools: Nothing | None = None
    functions: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class Call(NamedTuple):
    """A checked request."""

    question: Question
    options: dict[str, Any]
    stream: bool = False
    include_usage: bool = False


class Refusal(Exception):
    """An HTTP error to answer with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> dict[str, Any]:
        """As OpenAI's errors are."""
        kind = "invalid_request_error" if self.status < 429 else "server_busy"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}

    def response(self) -> Response:
        """The whole of the answer."""
        headers = {"Retry-After": "5"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def read_call(body: bytes, answerer: Answerer, name: str, limits: Limits) -> Call:
    """Check a request of the chat-completions interface, down to its prompt's tokens.

    Raises:
        Refusal: It is not one, asks for what is not offered, or for more than the limits allow.
        VLMambaError: A picture is wrong, or the chat template refuses the conversation.
    """
    try:
        given = _Body.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(400, _what_is_wrong(error)) from None
    if given.model not in (None, name):
        raise Refusal(404, f"there is no model {given.model!r} here; this is {name!r}")
    turns = [(message.role, _parts(message, f"message {at}")) for at, message in enumerate(given.messages)]
    parts = [part for _, parts in turns for part in parts]
    letters, images = (
        sum(len(p) for p in parts if isinstance(p, str)),
        [p for p in parts if isinstance(p, bytes)],
    )
    if len(images) > limits.images:
        raise Refusal(400, f"the request has {len(images)} pictures; at most {limits.images} are taken")
    pixels = sum(width * height for width, height in map(image_size, images))
    if pixels > limits.pixels:
        raise Refusal(
            400, f"the request's pictures have {pixels:,} pixels; at most {limits.pixels:,} are taken"
        )
    too_long = f"; at most {limits.prompt_tokens:,} tokens are taken, pictures included"
    if letters > limits.prompt_tokens * CHARACTERS_PER_TOKEN:
        raise Refusal(400, f"the prompt has {letters:,} characters{too_long}")
    question = answerer.encode(Request.of(turns))
    if len(question.input_ids) > limits.prompt_tokens:
        raise Refusal(400, f"the prompt has {len(question.input_ids):,} tokens{too_long}")
    sampling = {"do_sample": True, "temperature": given.temperature, "top_p": given.top_p or 1.0, "top_k": 0}
    options = {
        "max_new_tokens": min(
            given.max_completion_tokens or given.max_tokens or limits.new_tokens, limits.new_tokens
        ),
        "until": [given.stop] if isinstance(given.stop, str) else given.stop or [],
        "sampling": sampling if given.temperature else None,
        "seed": given.seed,
    }
    usage = given.stream_options is not None and given.stream_options.include_usage
    return Call(question, options, bool(given.stream), usage)


def _what_is_wrong(error: ValidationError) -> str:
    found = []
    for one in error.errors(include_url=False)[:3]:
        where = ".".join(map(str, one["loc"]))
        got = f", got {one['input']!r:.60}" if where and one["type"] != "missing" else ""
        found.append(f"{where or 'the request'}: {one['msg']}{got}")
    return "; ".join(found)


def _parts(message: _Message, where: str) -> list[str | bytes]:
    """Texts, and the bytes of pictures."""
    if isinstance(message.content, str):
        return [message.content]
    return [
        p.text if isinstance(p, _Text) else read_data_url(p.image_url.url, where) for p in message.content
    ]


def read_data_url(url: str, where: str) -> bytes:
    """The bytes of a picture in ``data:image/png;base64,...``.

    Raises:
        ImageError: It is no data URL, or its base64 is broken.
    """
    head, comma, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise ImageError(
            f"{where}: a picture must be a data URL (data:image/png;base64,...); this server loads nothing from "
            f"elsewhere, got {url[:60]!r}"
        )
    return from_base64(data, f"{where}: the base64 of a picture")


class _Job:
    """A request between its check and its answer.

    Attributes:
        items: Pieces of text, at last the completion or what went wrong.
        stopped: Whether the client has gone.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.items: asyncio.Queue[str | Completion | BaseException] = asyncio.Queue()
        self.stopped = threading.Event()
        self.has_turn = False


class Server:
    """What the routes do.

    Args:
        answerer: The checkpoint.
        name: What clients call the model.
        limits: Of a request.
        key: What clients must show (``Authorization: Bearer KEY``); nothing when left out.
    """

    def __init__(self, answerer: Answerer, name: str, limits: Limits, key: str | None) -> None:
        self.answerer, self.name, self.limits, self.key = answerer, name, limits, key
        self.held: dict[str, int] = {}  # bytes of the requests that are being read or wait
        self.underway = 0
        self.turn, self.checks = asyncio.Semaphore(1), asyncio.Semaphore(2)  # both serve in order of arrival

    async def health(self, request: HTTPRequest) -> Response:
        """Whether the server lives, and how many requests wait or are answered."""
        return JSONResponse({"status": "ok", "waiting": self.underway})

    async def models(self, request: HTTPRequest) -> Response:
        """The one model."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "vlmamba"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: HTTPRequest) -> Response:
        """Answer a request."""
        ticket = f"chatcmpl-{uuid.uuid4().hex}"
        try:
            self._check_key(request)
            body = await self._body(request, ticket)
            if self.underway >= self.limits.waiting:
                raise Refusal(429, f"{self.underway} requests are waiting already; try again later")
            self.underway += 1
            try:
                async with self.checks:
                    call = await asyncio.to_thread(read_call, body, self.answerer, self.name, self.limits)
                del body
                job = self._start(_Job(call), request, ticket)
            except BaseException:
                self.underway -= 1
                raise
        except ClientDisconnect:
            return Response(status_code=499)
        except VLMambaError as error:
            return Refusal(400, str(error)).response()
        except Refusal as error:
            return error.response()
        finally:
            self.held.pop(ticket, None)
        head = {"id": ticket, "created": int(time.time()), "model": self.name}
        item = await job.items.get()
        if call.stream and not isinstance(item, BaseException):
            return StreamingResponse(_events(job, item, head), media_type="text/event-stream")
        while isinstance(item, str):
            item = await job.items.get()
        if isinstance(item, BaseException):
            return _refusal(item).response()
        return JSONResponse(_completion(item, head))

    def _check_key(self, request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise Refusal(401, "the API key is missing or wrong (Authorization: Bearer KEY)")

    async def _body(self, request: HTTPRequest, ticket: str) -> bytes:
        """The body, within its limits of size and time."""
        limits, data, read = self.limits, bytearray(), 0
        try:
            async with asyncio.timeout(limits.read_seconds):
                async for piece in request.stream():
                    read += len(piece)
                    if read <= limits.body_bytes:
                        data += piece
                    elif (
                        read > 2 * limits.body_bytes
                    ):  # up to there a client is let finish, to hear why it is refused
                        break
                    self.held[ticket] = len(data)
                    if sum(self.held.values()) > limits.held_bytes:
                        raise Refusal(503, "the requests at hand fill the server's memory; try again later")
        except TimeoutError:
            raise Refusal(408, f"the request was not sent within {limits.read_seconds:g} seconds") from None
        if read > limits.body_bytes:
            raise Refusal(413, f"the request is larger than {limits.body_bytes:,} bytes")
        return bytes(data)

    def _start(self, job: _Job, request: HTTPRequest, ticket: str) -> _Job:
        """Set a request waiting for its turn, and somebody watching whether its client is there."""
        answering = asyncio.create_task(self._answer(job), name=ticket)

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.stopped.set()
            if not job.has_turn:  # else the thread that writes ends by itself
                answering.cancel()

        watching = asyncio.create_task(watch())

        def ended(task: asyncio.Task[Completion]) -> None:
            self.underway -= 1
            watching.cancel()
            gone = Refusal(499, "the client has gone") if task.cancelled() else task.exception()
            job.items.put_nowait(gone or task.result())

        answering.add_done_callback(ended)
        return job

    async def _answer(self, job: _Job) -> Completion:
        """Wait for the turn; then write in a thread, which alone uses the model."""
        limits = self.limits
        try:
            async with asyncio.timeout(limits.wait_seconds):
                await self.turn.acquire()
        except TimeoutError:
            raise Refusal(
                503, f"no turn came within {limits.wait_seconds:g} seconds; try again later"
            ) from None
        job.has_turn = True
        loop, until = asyncio.get_running_loop(), time.monotonic() + limits.write_seconds

        def write() -> Completion | None:
            return out_of_memory_is_none(
                lambda: self.answerer.write(
                    job.call.question,
                    **job.call.options,
                    on_text=lambda piece: loop.call_soon_threadsafe(job.items.put_nowait, piece),
                    stop=lambda: job.stopped.is_set() or time.monotonic() > until,
                ),
                self.answerer.model.device.type,
            )

        try:
            answer = await asyncio.to_thread(write)
        finally:
            self.turn.release()
        if answer is None:
            raise Refusal(503, "this request does not fit into the memory of the server")
        return answer


def _refusal(error: BaseException) -> Refusal:
    """What a client is told of an error behind the check."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, VLMambaError):
        return Refusal(400, str(error))
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed on this request; its log says why")


def _usage(answer: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }


def _completion(answer: Completion, head: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": "length" if answer.cut else "stop"}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}


async def _events(job: _Job, item: Any, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer; an error in it becomes the last but one."""

    def event(**more: Any) -> bytes:
        return b"data: " + JSONResponse(more).body + b"\n\n"

    def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
        usage = {"usage": None} if job.call.include_usage else {}
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return event(**head, object="chat.completion.chunk", choices=[choice], **usage)

    yield chunk({"role": "assistant", "content": ""})
    while isinstance(item, str):
        yield chunk({"content": item})
        item = await job.items.get()
    if isinstance(item, Completion):
        yield chunk({}, "length" if item.cut else "stop")
        if job.call.include_usage:
            yield event(**head, object="chat.completion.chunk", choices=[], usage=_usage(item))
    else:
        yield event(**_refusal(item).body())
    yield b"data: [DONE]\n\n"


def create_app(
    answerer: Answerer, *, name: str, limits: Limits | None = None, key: str | None = None
) -> Starlette:
    """An ASGI application; arguments as of `Server`."""
    server = Server(answerer, name, limits or Limits(), key)
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/v1/models", server.models),
            Route("/v1/chat/completions", server.complete, methods=["POST"]),
        ]
    )


class _Protocol(H11Protocol):
    """uvicorn's, which also lets go of clients that do not send the head of a request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.timeout_keep_alive, lambda: self.cycle is None and self.transport.close())


def serve(
    answerer: Answerer,
    *,
    name: str,
    host: str,
    port: int,
    limits: Limits | None = None,
    key: str | None = None,
) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: The port is taken.
    """
    import uvicorn

    app = create_app(answerer, name=name, limits=limits, key=key)
    closing = [("Connection", "close")]  # a connection for each request: none is held for nothing
    try:
        uvicorn.run(app, host=host, port=port, http=_Protocol, headers=closing, timeout_graceful_shutdown=5)
    except SystemExit as error:  # uvicorn ends so when it cannot bind
        raise ConfigError(f"cannot serve on {host}:{port}: see above; choose another --port") from error
