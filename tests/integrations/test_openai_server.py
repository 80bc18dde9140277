from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
import time

import pytest
from PIL import Image

from vlmamba.cli import main
from vlmamba.errors import MissingFileError
from vlmamba.evaluation import Sample, image_first
from vlmamba.evaluation.generation import encode_question, generate_answers
from vlmamba.integrations.asking import Answerer, Request, _Writer

testclient = pytest.importorskip("starlette.testclient", reason="the server is an extra")
pytest.importorskip("pydantic", reason="the server is an extra")
server = pytest.importorskip("vlmamba.integrations.openai_server", reason="the server is an extra")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LIMITS = server.Limits(
    body_bytes=40_000,
    held_bytes=100_000,
    images=2,
    pixels=20_000,
    prompt_tokens=300,
    new_tokens=12,
    waiting=1,
)


@pytest.fixture()
def answerer(checkpoint):
    return Answerer.load(checkpoint, device="cpu")


def client_of(answerer, limits=LIMITS, key=None):
    return testclient.TestClient(server.create_app(answerer, name="tiny", limits=limits, key=key))


@pytest.fixture()
def client(answerer):
    with client_of(answerer) as made:
        yield made


def data_url(picture):
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def asked(text, *pictures, **options):
    content = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        **options,
    }


def post(client, body):
    return client.post("/v1/chat/completions", json=body)


def error_of(response):
    return response.json()["error"]["message"]


def expected(answerer, text, *pictures, tokens=12):
    sample = Sample(0, tuple(pictures), text)
    question = encode_question(answerer.processor, sample, image_first(sample))
    (reply,) = generate_answers(answerer.model, answerer.processor, [question], max_new_tokens=tokens)
    return reply, len(question.input_ids)


def test_an_answer_is_that_of_the_model(client, answerer, pictures):
    reply, prompt = expected(answerer, "Where is the seven?", *pictures[:2])
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": reply.tokens,
        "total_tokens": prompt + reply.tokens,
    }
    answer = post(client, asked("Where is the seven?", *pictures[:2], temperature=0)).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": reply.text}
    assert answer["choices"][0]["finish_reason"] == ("length" if reply.cut else "stop")
    assert answer["usage"] == usage
    text, _ = expected(answerer, "Where?")
    plain = {"messages": [{"role": "user", "content": "Where?"}], "max_tokens": 99999}  # at most 12 here
    assert post(client, plain).json()["choices"][0]["message"]["content"] == text.text
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


def streamed(client, body):
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]), chunks


def test_a_streamed_answer_is_the_whole_one_in_pieces(client, answerer, pictures):
    reply, _ = expected(answerer, "What is in the image?", pictures[0])
    text, chunks = streamed(client, asked("What is in the image?", pictures[0]))
    assert text == reply.text
    assert len(chunks) >= 3
    assert chunks[-1]["choices"][0]["finish_reason"] == ("length" if reply.cut else "stop")
    stop = reply.text[3:5]
    before = reply.text[: reply.text.index(stop)].strip()
    text, chunks = streamed(client, asked("What is in the image?", pictures[0], stop=stop))
    assert text == before
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    whole = post(client, asked("What is in the image?", pictures[0], stop=[stop])).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (before, "stop")
    assert client.get("/health").json()["waiting"] == 0


def test_a_stream_says_what_it_cost_where_asked(client, answerer):
    reply, prompt = expected(answerer, "Where?")
    _, chunks = streamed(client, {**asked("Where?"), "stream_options": {"include_usage": True}})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] == prompt
    assert chunks[-1]["usage"]["completion_tokens"] == reply.tokens
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_sampling(client, pictures):
    body = asked("Where?", pictures[0], temperature=3.0, top_p=0.9)

    def text(**more):
        return post(client, {**body, **more}).json()["choices"][0]["message"]["content"]

    assert len({text() for _ in range(6)}) > 1
    assert text(seed=5) == text(seed=5)
    assert text(temperature=0.01) == text(temperature=0.01)


MESSAGES = [{"role": "user", "content": "x"}]
DEEP = '{"messages": ' + "[" * 10_000 + "]" * 10_000 + "}"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "Invalid JSON"),
        ("", 400, "Invalid JSON"),
        ("[]", 400, "the request"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (DEEP, 400, "recursion limit"),
        ('{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}', 400, "top_p: "),
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', 400, "temperature: "),
        (f'{{"messages": [{{"role": "user", "content": "x"}}], "top_p": 1{"0" * 400}}}', 400, "top_p: "),
        (f'{{"max_tokens": 1{"0" * 5000}}}', 400, "number out of range"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"content": "x"}]}, 400, "messages.0.role: Field required"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "input_audio"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, 400, "text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "the chat template refuses this conversation"),
        ({"messages": MESSAGES, "model": "gpt"}, 404, "no model 'gpt' here; this is 'tiny'"),
        ({"messages": MESSAGES, "model": 1}, 400, "model: "),
        ({"messages": MESSAGES, "n": 2}, 400, "n: Input should be less than or equal to 1, got 2"),
        ({"messages": MESSAGES, "n": True}, 400, "n: "),
        ({"messages": MESSAGES, "logprobs": True}, 400, "logprobs: "),
        ({"messages": MESSAGES, "tools": [{}]}, 400, "tools: "),
        ({"messages": MESSAGES, "presence_penalty": 0.5}, 400, "presence_penalty: "),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"messages": MESSAGES, "temprature": 1}, 400, "temprature: Extra inputs are not permitted"),
        ({"messages": MESSAGES, "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
        ({"messages": MESSAGES, "temperature": True}, 400, "temperature: "),
        ({"messages": MESSAGES, "temperature": -1}, 400, "temperature: "),
        ({"messages": MESSAGES, "temperature": 1e-40}, 400, "or at least 0.01"),
        ({"messages": MESSAGES, "temperature": 1e300}, 400, "temperature: "),
        ({"messages": MESSAGES, "top_p": 0}, 400, "top_p: Input should be greater than 0"),
        ({"messages": MESSAGES, "max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens: "),
        ({"messages": MESSAGES, "max_tokens": True}, 400, "max_tokens: "),
        ({"messages": MESSAGES, "max_tokens": 1.5}, 400, "max_tokens: "),
        ({"messages": MESSAGES, "max_completion_tokens": "5"}, 400, "max_completion_tokens: "),
        ({"messages": MESSAGES, "stream": "false"}, 400, "stream: Input should be a valid boolean"),
        ({"messages": MESSAGES, "stop": [""]}, 400, "stop"),
        ({"messages": MESSAGES, "stop": ["a"] * 99}, 400, "stop"),
        ({"messages": [{"role": "user", "content": "x" * 41_000}]}, 413, "larger than 40,000 bytes"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, 400, "the prompt has 30,000 characters"),
        ({"messages": [{"role": "user", "content": "a b " * 900}]}, 400, "at most 300 tokens are taken"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_answered_with_what_is_wrong(client, body, status, message, stream):
    if isinstance(body, dict):
        body = json.dumps({"stream": stream, **body})
    elif stream:
        pytest.skip("the same")
    response = client.post("/v1/chat/completions", content=body)
    assert (response.status_code, message in error_of(response)) == (status, True), response.text
    assert client.get("/health").json()["waiting"] == 0


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/x.png", "a picture must be a data URL"),
        ("file:///etc/passwd", "this server loads nothing from elsewhere, got 'file:///etc/passwd'"),
        ("/etc/passwd", "this server loads nothing from elsewhere"),
        ("data:text/html;base64,AAAA", "a picture must be a data URL"),
        ("data:image/png;base64,###", "base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
        ("big", "the request's pictures have 40,000 pixels; at most 20,000 are taken"),
        ("cut", "corrupt or cut off"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_pictures_from_elsewhere_and_broken_ones_are_refused(client, url, message, stream, pictures):
    if url == "big":
        url = data_url(Image.new("RGB", (200, 200)))
    if url == "cut":
        url = data_url(Image.effect_noise((120, 120), 60))[:-4000]
    body = asked("Where?")
    body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
    response = post(client, {**body, "stream": stream})
    assert response.status_code == 400
    assert message in error_of(response)
    assert client.get("/health").json()["waiting"] == 0


def test_too_many_pictures_are_refused(client, pictures):
    response = post(client, asked("Where?", *pictures))
    assert (response.status_code, error_of(response)) == (
        400,
        "the request has 3 pictures; at most 2 are taken",
    )


def test_who_has_no_key_is_turned_away(answerer):
    client = client_of(answerer, key="secret")
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        response = client.post("/v1/chat/completions", json=asked("Where?"), headers=header)
        assert (response.status_code, "Bearer KEY" in error_of(response)) == (401, True)
    given = {"Authorization": "Bearer secret"}
    assert client.post("/v1/chat/completions", json=asked("Where?"), headers=given).status_code == 200


@contextlib.contextmanager
def busy(answerer, monkeypatch):
    """Somebody is being answered until the block ends."""
    started, go_on, write = threading.Event(), threading.Event(), answerer.write

    def slow(*given, stop, **options):
        started.set()
        while not go_on.is_set() and not stop():
            time.sleep(0.005)
        return write(*given, stop=stop, **options)

    monkeypatch.setattr(answerer, "write", slow)
    yield started
    go_on.set()


def wait_for(client, waiting):
    until = time.monotonic() + 20
    while client.get("/health").json()["waiting"] != waiting:
        assert time.monotonic() < until, f"never {waiting} waiting"
        time.sleep(0.01)


def test_more_requests_than_may_wait_are_turned_away(client, answerer, monkeypatch):
    results = []
    waiting = threading.Thread(target=lambda: results.append(post(client, asked("Where?")).status_code))
    with busy(answerer, monkeypatch):
        waiting.start()
        wait_for(client, 1)
        turned_away = post(client, asked("Where?"))
    waiting.join()
    assert (turned_away.status_code, turned_away.headers["retry-after"]) == (429, "5")
    assert error_of(turned_away) == "1 requests are waiting already; try again later"
    assert results == [200]


def test_who_waits_too_long_is_told_so_and_an_answer_ends_in_time(answerer, monkeypatch):
    limits = server.Limits(wait_seconds=0.2, write_seconds=1.0)
    results = []
    with client_of(answerer, limits) as client, busy(answerer, monkeypatch) as started:
        first = threading.Thread(target=lambda: results.append(post(client, asked("Where?", max_tokens=500))))
        first.start()
        assert started.wait(20)
        late = post(client, {**asked("Where?"), "stream": True})
        assert (late.status_code, "no turn came within 0.2 seconds" in error_of(late)) == (503, True)
        first.join()  # `busy` never lets go: the limit of one second did
        assert results[0].json()["choices"][0]["finish_reason"] == "length"


class Client:
    """One request at the ASGI door, with a client that sends and leaves when it is told."""

    def __init__(self, app, body, *, cut=False):
        self.app, self.sent, self.gone = app, [], asyncio.Event()
        self.parts = [{"type": "http.request", "body": body, "more_body": cut}]

    async def receive(self):
        if self.parts:
            return self.parts.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    def start(self):
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [],
            "query_string": b"",
        }
        return asyncio.ensure_future(self.app(scope, self.receive, self.send))


@pytest.mark.parametrize("stream", [False, True])
def test_work_for_clients_that_have_gone_stops(answerer, monkeypatch, stream):
    async def visit():
        app = server.create_app(answerer, name="tiny", limits=server.Limits(waiting=3))
        with busy(answerer, monkeypatch) as started:
            body = json.dumps(asked("Where?", max_tokens=2000, stream=stream)).encode()
            first, waiting = Client(app, body), Client(app, body)
            writes = first.start()
            assert await asyncio.to_thread(started.wait, 20)
            waits = waiting.start()
            await asyncio.sleep(0.2)
            waiting.gone.set()  # it leaves the queue,
            await asyncio.wait_for(waits, 20)
            assert waiting.sent[0]["status"] == 499
            first.gone.set()  # and this one stops the model, though `busy` would go on
            await asyncio.wait_for(writes, 20)
            third = Client(app, json.dumps(asked("Where?", max_tokens=1)).encode())
        await asyncio.wait_for(third.start(), 20)
        assert third.sent[0]["status"] == 200

    asyncio.run(visit())


def test_half_sent_requests_hold_no_place(answerer):
    async def visit():
        limits = server.Limits(waiting=1, read_seconds=0.3, held_bytes=3000, body_bytes=2500, new_tokens=4)
        app = server.create_app(answerer, name="tiny", limits=limits)
        slow = [Client(app, b"{" + b" " * 1000, cut=True) for _ in range(2)]
        tasks = [client.start() for client in slow]
        await asyncio.sleep(0.05)
        honest, heavy = Client(app, json.dumps(asked("Where?")).encode()), Client(app, b" " * 2000)
        await asyncio.gather(honest.start(), heavy.start(), *tasks)
        assert honest.sent[0]["status"] == 200
        assert heavy.sent[0]["status"] == 503  # the memory for bodies was taken
        assert [client.sent[0]["status"] for client in slow] == [408, 408]
        after = Client(app, b" " * 2000)
        await after.start()
        assert after.sent[0]["status"] == 400

    asyncio.run(visit())


class Letters:
    """A tokenizer of one byte a token."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "until", "pieces"),
    [
        (" hello  you ", [], ["h", "e", "l", "l", "o", "  y", "o", "u"]),
        ("aéb", [], ["a", "é", "b"]),
        ("one two three", ["two th"], ["o", "ne"]),
        ("one two", ["two th"], ["o", "ne", " two"]),
        ("\n\nab\ncd", ["\n"], ["a", "b"]),
        ("abc", ["", "x"], ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_pieces_are_what_no_later_token_can_change(text, until, pieces):
    torch = pytest.importorskip("torch")
    got = []
    writer = _Writer(Letters(), [0], until, got.append)
    for value in [torch.zeros(1, 3), *(torch.tensor([[byte]]) for byte in [*text.encode(), 0])]:
        writer.put(value)
    writer.end()
    assert [len(piece) > 0 for piece in got] == [True] * len(got)
    assert (got, "".join(got)) == (pieces, writer.sent)


def test_an_unfinished_character_is_shown_at_the_end():
    torch = pytest.importorskip("torch")
    got = []
    writer = _Writer(Letters(), [0], [], got.append)
    for value in [torch.zeros(1, 3), *(torch.tensor([[byte]]) for byte in "é".encode()[:1])]:
        writer.put(value)
    assert got == []
    writer.end()
    assert got == ["\ufffd"]


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "no exported model at" in capsys.readouterr().err
    with pytest.raises(MissingFileError, match="no exported model at"):
        Answerer.load(tmp_path / "none")


def test_turns_of_text_and_pictures():
    request = Request.of([("system", ["Be brief."]), ("user", [b"picture", "Where?"])])
    assert request.images == (b"picture",)
    assert request.messages[1]["content"][:2] == [{"type": "image"}, {"type": "text", "text": "\n"}]
