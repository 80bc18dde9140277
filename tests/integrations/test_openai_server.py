from __future__ import annotations

import base64
import io
import json
import threading
import time

import pytest
import torch
from PIL import Image

from vlmamba.cli import main
from vlmamba.errors import MissingFileError
from vlmamba.evaluation import Sample, image_first
from vlmamba.evaluation.generation import Reply, encode_question, generate_answers
from vlmamba.integrations import asking
from vlmamba.integrations.asking import Answerer, hold_back, user_message
from vlmamba.integrations.openai_server import Limits, create_app

fastapi_testing = pytest.importorskip("fastapi.testclient", reason="the server is an extra")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LIMITS = Limits(body_bytes=20_000, images=2, new_tokens=12, waiting=1)


@pytest.fixture()
def answerer(checkpoint):
    return Answerer.load(checkpoint, device="cpu")


@pytest.fixture()
def client(answerer):
    with fastapi_testing.TestClient(create_app(answerer, name="tiny", limits=LIMITS)) as made:
        yield made


def data_url(path):
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "PNG")
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


def expected(answerer, text, *pictures, tokens=12):
    sample = Sample(0, tuple(pictures), text)
    question = encode_question(answerer.processor, sample, image_first(sample))
    (reply,) = generate_answers(answerer.model, answerer.processor, [question], max_new_tokens=tokens)
    return reply, len(question.input_ids)


def test_an_answer_is_that_of_the_model(client, answerer, pictures):
    reply, prompt = expected(answerer, "Where is the seven?", *pictures[:2])
    answer = post(client, asked("Where is the seven?", *pictures[:2], temperature=0)).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": reply.text}
    assert answer["choices"][0]["finish_reason"] == ("length" if reply.cut else "stop")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": reply.tokens,
        "total_tokens": prompt + reply.tokens,
    }
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
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    return "".join(c["delta"].get("content", "") for c in chunks), chunks


def test_a_reader_who_is_late_hears_of_the_stop_string_all_the_same(answerer, pictures):
    reply, _ = expected(answerer, "What is in the image?", pictures[0])
    assert reply.cut
    request = user_message("What is in the image?", pictures[:1])
    stream = answerer.stream(request, max_new_tokens=12, until=[reply.text[-3:]])
    first = next(stream)
    time.sleep(1)  # meanwhile the model writes to its limit
    text = first + "".join(stream)
    assert text.strip() == reply.text[: reply.text.index(reply.text[-3:])].strip()
    assert not stream.cut


def test_a_streamed_answer_is_the_same_text_in_pieces(client, answerer, pictures):
    reply, _ = expected(answerer, "What is in the image?", pictures[0])
    text, chunks = streamed(client, asked("What is in the image?", pictures[0]))
    assert text.strip() == reply.text
    assert len(chunks) >= 3
    assert chunks[-1]["finish_reason"] == ("length" if reply.cut else "stop")
    stop = reply.text[3:5]
    before = reply.text[: reply.text.index(stop)].strip()
    text, chunks = streamed(client, asked("What is in the image?", pictures[0], stop=stop))
    assert text.strip() == before
    assert chunks[-1]["finish_reason"] == "stop"
    whole = post(client, asked("What is in the image?", pictures[0], stop=[stop])).json()["choices"][0]
    assert (whole["message"]["content"], whole["finish_reason"]) == (before, "stop")
    assert client.get("/health").json()["waiting"] == 0


def test_sampling(client, pictures):
    body = asked("Where?", pictures[0], temperature=3.0, top_p=0.9)
    assert len({post(client, body).json()["choices"][0]["message"]["content"] for _ in range(6)}) > 1


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "the request is not JSON"),
        ({"messages": []}, 400, "no list of messages"),
        ({"messages": [{"content": "x"}]}, 400, "message 0 has no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "text or image_url, got 'input_audio'",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "the chat template refuses this conversation",
        ),
        (
            {"model": "gpt", "messages": [{"role": "user", "content": "x"}]},
            404,
            "no model 'gpt' here; this is 'tiny'",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "n": 2}, 400, "n=2 is not offered"),
        (
            {"messages": [{"role": "user", "content": "x"}], "temperature": "hot"},
            400,
            "temperature must be a number",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": -1},
            400,
            "max_tokens must be at least 1",
        ),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, 413, "larger than 20,000 bytes"),
    ],
)
def test_wrong_requests_are_answered_with_what_is_wrong(client, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post("/v1/chat/completions", content=content)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert client.get("/health").json()["waiting"] == 0


def picture_request(url):
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/x.png", "a picture must be a data URL"),
        ("file:///etc/passwd", "this server loads nothing from elsewhere, got 'file:///etc/passwd'"),
        ("data:text/html;base64,AAAA", "a picture must be a data URL"),
        ("data:image/png;base64,###", "the base64 of a picture is broken"),
        ("data:image/png;base64,AAAA", "image"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_pictures_from_elsewhere_and_broken_ones_are_refused(client, url, message, stream):
    response = post(client, {**picture_request(url), "stream": stream})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_too_many_pictures_are_refused(client, pictures):
    response = post(client, asked("Where?", *pictures))
    assert (response.status_code, response.json()["error"]["message"]) == (
        400,
        "more than 2 pictures in one request",
    )


def test_more_requests_than_may_wait_are_turned_away(client, answerer):
    answerer.lock.acquire()  # somebody is being answered
    body = {"messages": [{"role": "user", "content": "Where?"}]}
    results = []
    waiting = threading.Thread(target=lambda: results.append(post(client, body).status_code))
    waiting.start()
    while client.get("/health").json()["waiting"] == 0:
        time.sleep(0.01)
    turned_away = post(client, body)
    answerer.lock.release()
    waiting.join()
    assert turned_away.status_code == 429
    assert turned_away.json()["error"]["message"] == "1 requests are waiting already; try again later"
    assert results == [200]


def test_a_stream_that_is_given_up_frees_the_model(answerer, monkeypatch):
    written = []

    def endless(model, processor, questions, *, streamer, stopping_criteria, **options):
        ids = torch.zeros(1, 1, dtype=torch.long)
        while not stopping_criteria[0](ids, None).all():
            written.append("word ")
            streamer.on_finalized_text("word ")
            time.sleep(0.001)
        streamer.end()
        return [Reply("".join(written), len(written), True)]

    monkeypatch.setattr(asking, "sample_answers", endless)
    stream = answerer.stream(user_message("Where is the seven?", []), max_new_tokens=10)
    assert [next(stream), next(stream)] == ["word ", "word "]
    assert answerer.lock.locked()
    del stream
    assert not answerer.lock.locked()
    count = len(written)
    time.sleep(0.02)
    assert len(written) == count


def test_text_that_may_begin_a_stop_is_held_back():
    pieces = list(hold_back(iter(["one ", "tw", "o thr", "ee"]), ["two three", "xx"]))
    assert "".join(pieces) == "one "
    assert "".join(hold_back(iter(["one ", "tw", "o thr"]), ["two three"])) == "one two thr"
    assert list(hold_back(iter(["a", "b"]), [])) == ["a", "b"]


def test_the_command_names_what_is_missing(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert "no exported model at" in capsys.readouterr().err
    with pytest.raises(MissingFileError, match="no exported model at"):
        Answerer.load(tmp_path / "none")
