"""A checkpoint behind OpenAI's chat-completions interface, for clients and harnesses that speak it.

``GET /v1/models``, ``GET /health`` and ``POST /v1/chat/completions``, whole or streamed as server-sent events
(https://platform.openai.com/docs/api-reference/chat). Pictures come as data URLs; nothing is loaded from elsewhere.
One request is answered at a time, a few wait, more are turned away.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from vlmamba.errors import ConfigError, DataError, VLMambaError, require
from vlmamba.integrations.asking import Answerer, AnswerStream, Request

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
"""Parameters that are not offered, and the values that ask for nothing."""


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        body_bytes: Of the request as sent, pictures included.
        images: Pictures.
        new_tokens: Longest answer; what asks for more gets this (and ``finish_reason`` "length").
        waiting: Requests that may wait or be answered at the same time.
    """

    body_bytes: int = 32 * 2**20
    images: int = 16
    new_tokens: int = 2048
    waiting: int = 32


@dataclass(frozen=True)
class Call:
    """A checked request."""

    request: Request
    options: dict[str, Any]
    stream: bool


class Refusal(Exception):
    """An HTTP error to answer with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def create_app(answerer: Answerer, *, name: str, limits: Limits | None = None) -> Any:
    """A FastAPI application.

    Args:
        answerer: The checkpoint.
        name: What clients call the model.
        limits: Of a request.

    Raises:
        MissingDependencyError: FastAPI is not installed.
    """
    fastapi = require("fastapi", extra="serve", feature="vlmamba serve")
    routing = require("starlette.routing", extra="serve", feature="vlmamba serve")
    responses = require("starlette.responses", extra="serve", feature="vlmamba serve")
    in_threads = require("starlette.concurrency", extra="serve", feature="vlmamba serve")
    bounds = limits or Limits()
    underway: set[str] = set()

    def refuse(error: Refusal) -> Any:
        kind = "invalid_request_error" if error.status < 429 else "server_busy"
        body = {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}
        return responses.JSONResponse(body, status_code=error.status)

    async def health(request: Any) -> Any:
        return responses.JSONResponse({"status": "ok", "waiting": len(underway)})

    async def models(request: Any) -> Any:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "vlmamba"}
        return responses.JSONResponse({"object": "list", "data": [model]})

    async def complete(request: Any) -> Any:
        ticket = f"chatcmpl-{uuid.uuid4().hex}"
        try:
            if len(underway) >= bounds.waiting:
                raise Refusal(429, f"{len(underway)} requests are waiting already; try again later")
            underway.add(ticket)
            call = read_call(await _body(request, bounds.body_bytes), name, bounds)
            if call.stream:
                answer = answerer.stream(call.request, **call.options)
                pieces = in_threads.iterate_in_threadpool(answer)
                events = _events(answer, pieces, ticket, name, lambda: underway.discard(ticket))
                return responses.StreamingResponse(events, media_type="text/event-stream")
            answer = await in_threads.run_in_threadpool(answerer.complete, call.request, **call.options)
        except Refusal as error:
            underway.discard(ticket)
            return refuse(error)
        except VLMambaError as error:
            underway.discard(ticket)
            return refuse(Refusal(400, str(error)))
        except BaseException:
            underway.discard(ticket)
            raise
        underway.discard(ticket)
        return responses.JSONResponse(_completion(answer, ticket, name))

    return fastapi.FastAPI(
        title="vlmamba",
        routes=[
            routing.Route("/health", health),
            routing.Route("/v1/models", models),
            routing.Route("/v1/chat/completions", complete, methods=["POST"]),
        ],
    )


async def _body(request: Any, limit: int) -> bytes:
    """The body, read no further than the limit."""
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise Refusal(413, f"the request is larger than {limit:,} bytes")
    return data


def read_call(body: bytes, name: str, limits: Limits) -> Call:
    """Check a request of the chat-completions interface.

    Raises:
        Refusal: It is not one, or asks for what is not offered.
        DataError: A picture is wrong.
    """
    try:
        given = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list) or not given["messages"]:
        raise Refusal(400, "the request has no list of messages")
    if given.get("model", name) != name:
        raise Refusal(404, f"there is no model {given['model']!r} here; this is {name!r}")
    for key, neutral in NEUTRAL.items():
        if given.get(key) is not None and given[key] not in neutral:
            raise Refusal(400, f"{key}={given[key]!r} is not offered")
    wanted = given.get("max_completion_tokens") or given.get("max_tokens") or limits.new_tokens
    temperature, top_p = _number(given, "temperature", 0.0), _number(given, "top_p", 1.0)
    stop = given.get("stop") or []
    if not isinstance(wanted, int) or wanted < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise Refusal(400, "max_tokens must be at least 1, temperature at least 0, top_p in (0, 1]")
    if not isinstance(stop, str) and not (isinstance(stop, list) and all(isinstance(s, str) for s in stop)):
        raise Refusal(400, "stop must be a string or a list of strings")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    options = {
        "max_new_tokens": min(wanted, limits.new_tokens),
        "until": [stop] if isinstance(stop, str) else stop,
        "sampling": sampling if temperature > 0 else None,
    }
    return Call(_request(given["messages"], limits), options, bool(given.get("stream")))


def _number(given: Mapping[str, Any], key: str, default: float) -> float:
    value = given.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal(400, f"{key} must be a number, got {value!r}")
    return float(value)


def _request(messages: list[Any], limits: Limits) -> Request:
    made: list[dict[str, Any]] = []
    images: list[bytes] = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal(400, f"message {at} has no role")
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts: list[dict[str, Any]] = []
        for given in parts if isinstance(parts, list) else [None]:
            part = given if isinstance(given, dict) else {}
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append({"type": "text", "text": part["text"]})
            elif kind == "image_url":
                if len(images) == limits.images:
                    raise Refusal(400, f"more than {limits.images} pictures in one request")
                images.append(read_data_url(part.get("image_url"), f"message {at}"))
                texts += [{"type": "image"}, {"type": "text", "text": "\n"}]
            else:
                raise Refusal(400, f"message {at}: a part must be text or image_url, got {kind!r}")
        made.append({"role": message["role"], "content": texts})
    return Request(made, tuple(images))


def read_data_url(image: Any, where: str) -> bytes:
    """The bytes of a picture in ``{"url": "data:image/png;base64,..."}``.

    Raises:
        DataError: It is no data URL, or its base64 is broken.
    """
    url = image.get("url") if isinstance(image, dict) else image
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise DataError(
            f"{where}: a picture must be a data URL (data:image/png;base64,...); this server loads nothing from "
            f"elsewhere, got {str(url)[:60]!r}"
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the base64 of a picture is broken: {error}") from error


def _completion(answer: Any, ticket: str, name: str) -> dict[str, Any]:
    return {
        "id": ticket,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": "length" if answer.cut else "stop",
            }
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": answer.prompt_tokens + answer.tokens,
        },
    }


async def _events(
    answer: AnswerStream, pieces: AsyncIterator[str], ticket: str, name: str, done: Any
) -> AsyncIterator[str]:
    """Server-sent events of a streamed answer; an error in it becomes the last event."""
    head = {"id": ticket, "object": "chat.completion.chunk", "created": int(time.time()), "model": name}

    def event(delta: dict[str, Any], finish: str | None = None) -> str:
        return f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""})
        try:
            async for piece in pieces:
                yield event({"content": piece})
            yield event({}, "length" if answer.cut else "stop")
        except VLMambaError as error:
            yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'invalid_request_error'}})}\n\n"
        yield "data: [DONE]\n\n"
    finally:  # also when the client has gone
        answer.close()
        done()


def serve(answerer: Answerer, *, name: str, host: str, port: int, limits: Limits | None = None) -> None:
    """Serve until interrupted.

    Raises:
        ConfigError: The port is taken.
        MissingDependencyError: FastAPI or uvicorn is not installed.
    """
    app = create_app(answerer, name=name, limits=limits)
    uvicorn = require("uvicorn", extra="serve", feature="vlmamba serve")
    try:
        uvicorn.run(app, host=host, port=port, log_level="info")
    except SystemExit as error:  # uvicorn ends so when it cannot bind
        raise ConfigError(f"cannot serve on {host}:{port}: see above; choose another --port") from error
