"""The whole model: laws of batching, packing, placeholders, saving, generating."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

import vlmamba.models  # noqa: F401 - registers the Auto classes
from vlmamba.errors import ShapeError
from vlmamba.testing import tiny_model
from vlmamba.testing.models import TINY_OPTIONS

from .test_processing import asks, says

CONNECTORS = sorted(TINY_OPTIONS)


def encode(processor, messages):
    encoded = processor.encode_messages(messages)
    pixels = (
        processor.image_processor(
            [
                p["image"]
                for m in messages
                if not isinstance(m["content"], str)
                for p in m["content"]
                if p["type"] == "image"
            ]
            or None,
            return_tensors="pt",
        )["pixel_values"]
        if encoded.num_images
        else None
    )
    return torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels]), pixels


CHATS = [
    [asks("\nWhat is in the image?"), says("a red square")],
    [
        asks("Where is the seven?", image=False),
        says("Top left."),
        asks("And now?\n"),
        says("Two."),
        asks("x"),
        says(""),
    ],
    [asks("How many digits?", image=False), says("3")],
]


def padded(rows, value, side):
    width = max(r.shape[1] for r in rows)
    pad = [torch.full((1, width - r.shape[1]), value) for r in rows]
    return torch.cat(
        [torch.cat([p, r] if side == "left" else [r, p], 1) for p, r in zip(pad, rows, strict=True)]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("language", ["mamba", "llama"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_batch_equals_its_rows_alone(connector, language, side):
    model, processor = tiny_model(connector, language=language)
    rows = [encode(processor, chat) for chat in CHATS]
    ids = padded([r[0] for r in rows], 0, side)
    mask = padded([torch.ones_like(r[0]) for r in rows], 0, side)
    labels = padded([r[1] for r in rows], -100, side)
    pixels = torch.cat([r[2] for r in rows if r[2] is not None])
    batch = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels, logits_to_keep=0)
    total, count = 0.0, 0
    for i, (single, label, pixel) in enumerate(rows):
        alone = model(input_ids=single, pixel_values=pixel, labels=label, logits_to_keep=0)
        torch.testing.assert_close(batch.logits[i][mask[i].bool()], alone.logits[0], atol=1e-5, rtol=1e-5)
        supervised = int((label[:, 1:] != -100).sum())
        total, count = total + alone.loss * supervised, count + supervised
    torch.testing.assert_close(batch.loss, total / count, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("language", ["mamba", "llama"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_packed_row_equals_its_samples_alone(connector, language):
    model, processor = tiny_model(connector, language=language)
    rows = [encode(processor, chat) for chat in CHATS]
    seq_idx = torch.cat([torch.full(r[0].shape, i, dtype=torch.int32) for i, r in enumerate(rows)], 1)
    ids, labels = (torch.cat([r[k] for r in rows], 1) for k in (0, 1))
    pixels = torch.cat([r[2] for r in rows if r[2] is not None])
    packed = model(input_ids=ids, pixel_values=pixels, labels=labels, seq_idx=seq_idx, logits_to_keep=0)
    alone = [model(input_ids=i, pixel_values=p, labels=y, logits_to_keep=0) for i, y, p in rows]
    torch.testing.assert_close(packed.logits, torch.cat([a.logits for a in alone], 1), atol=1e-5, rtol=1e-5)
    counts = [int((r[1][:, 1:] != -100).sum()) for r in rows]
    mean = sum(a.loss * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(packed.loss, mean, atol=1e-5, rtol=1e-5)


def test_changing_one_packed_sample_moves_no_other():
    model, processor = tiny_model("vss-l2")
    rows = [encode(processor, chat) for chat in CHATS]
    seq_idx = torch.cat([torch.full(r[0].shape, i, dtype=torch.int32) for i, r in enumerate(rows)], 1)
    ids = torch.cat([r[0] for r in rows], 1)
    pixels = torch.cat([r[2] for r in rows if r[2] is not None])
    first = rows[0][0].shape[1]
    before = model(input_ids=ids, pixel_values=pixels, seq_idx=seq_idx).logits
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 300
    pixels[0] += 1
    after = model(input_ids=changed, pixel_values=pixels, seq_idx=seq_idx).logits
    assert torch.equal(before[:, first:], after[:, first:])
    assert not torch.equal(before[:, :first], after[:, :first])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_generation_equals_single(side):
    model, processor = tiny_model("vss-l2")
    chats = [[asks("What?")], [asks("How many digits are there?"), says("Two."), asks("Where?", image=False)]]
    options = {"tokenize": True, "add_generation_prompt": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(chats, padding_side=side, **options)
    tokens = model.generate(**batch, max_new_tokens=10, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for chat, row in zip(chats, tokens, strict=True):
        single = processor.apply_chat_template(chat, **options)
        alone = model.generate(**single, max_new_tokens=10, do_sample=False)[
            0, single["input_ids"].shape[1] :
        ]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_cached_decoding_equals_recomputing():
    model, processor = tiny_model("qmamba")
    single = processor.apply_chat_template(
        [asks("What?")], tokenize=True, add_generation_prompt=True, return_tensors="pt"
    )
    ids = single["input_ids"]
    for _ in range(6):
        logits = model(input_ids=ids, pixel_values=single["pixel_values"]).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    generated = model.generate(**single, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert generated.tolist() == ids.tolist()


def test_text_streams_token_by_token():
    model, processor = tiny_model()
    single = processor.apply_chat_template(
        [asks("What?")], tokenize=True, add_generation_prompt=True, return_tensors="pt"
    )
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = model.generate(**single, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(tokens[0, single["input_ids"].shape[1] :])


@pytest.mark.parametrize("language", ["mamba", "llama"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_saved_and_loaded_bit_equal(connector, language, tmp_path):
    model, processor = tiny_model(connector, language=language)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).num_image_tokens == processor.num_image_tokens
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids, _, pixels = encode(processor, CHATS[0])
    assert torch.equal(
        model(input_ids=ids, pixel_values=pixels).logits, loaded(input_ids=ids, pixel_values=pixels).logits
    )
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (language == "mamba")


def test_the_scan_chosen_after_training_is_saved(tmp_path):
    model, _ = tiny_model("vss-l2", scan="csm")
    model.multi_modal_projector.set_scan("forward")
    model.save_pretrained(tmp_path)
    assert AutoModelForImageTextToText.from_pretrained(tmp_path).multi_modal_projector.vss.scan == "forward"


def test_transformers_pipeline(tmp_path):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    answer = pipe(text=[asks("What?")], generate_kwargs={"max_new_tokens": 4, "do_sample": False})
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_text_only_rows_reach_the_connector_in_training():
    model, processor = tiny_model("mlp")
    model.train()
    model.vision_tower.requires_grad_(False)
    ids, labels, _ = encode(processor, CHATS[2])
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    gradients = [p.grad for p in model.multi_modal_projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    model.eval()
    torch.testing.assert_close(model(input_ids=ids, labels=labels).loss, loss)


def test_nothing_supervised_gives_zero_with_a_graph():
    model, processor = tiny_model()
    ids, labels, pixels = encode(processor, CHATS[0])
    loss = model(input_ids=ids, pixel_values=pixels, labels=torch.full_like(labels, -100)).loss
    assert loss.item() == 0.0
    loss.backward()


def test_placeholder_counts_that_differ_raise_with_both():
    model, processor = tiny_model()
    ids, _, pixels = encode(processor, CHATS[0])
    with pytest.raises(
        ShapeError, match=r"holds 15 image placeholders .* 1 image\(s\) give 1 x 16 visual tokens"
    ):
        wrong = ids.clone()
        wrong[0, (ids[0] == processor.image_token_id).nonzero()[0]] = 5
        model(input_ids=wrong, pixel_values=pixels)
    with pytest.raises(ShapeError, match=r"holds 16 image placeholders .* no pixel_values"):
        model(input_ids=ids)
    with pytest.raises(TypeError, match="does not take pixel_value"):
        model(input_ids=ids, pixel_value=pixels)


def test_frozen_encoder_runs_without_graph_and_connector_learns():
    model, processor = tiny_model("vss-l2")
    model.train()
    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)
    ids, labels, pixels = encode(processor, CHATS[0])
    model(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.multi_modal_projector.parameters())


def test_gradient_checkpointing_changes_nothing():
    model, processor = tiny_model("vss-l2")
    ids, labels, pixels = encode(processor, CHATS[0])
    model.train()
    model(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(p.grad, plain[name], msg=name)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[1, 10**6]]}, "input_ids has values from 1 to 1000000, but only those from 0 to"),
        ({"input_ids": [[-1, 2]]}, "input_ids has values from -1 to 2, but only those from 0 to"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids has dtype torch.float32, but an integer dtype"),
        (
            {"labels": torch.tensor([[1, 10**6, 2]])},
            "labels has values from 2 to 1000000, but only those from 0 to",
        ),
        ({"labels": torch.tensor([[1, 2, -7]])}, "labels has values from -7 to 2, but only those from 0 to"),
        ({"logits_to_keep": -2}, "logits_to_keep is -2"),
        ({"logits_to_keep": torch.tensor([0, 3])}, "from 0 to 3, but only those from 0 to 2 exist"),
        ({"logits_to_keep": torch.tensor([-1])}, "from -1 to -1, but only those from 0 to 2 exist"),
        ({"logits_to_keep": torch.zeros(2, 1, dtype=torch.long)}, r"\(2, 1\) but the input has 1 rows"),
        ({"logits_to_keep": torch.zeros(1, 1, 1, dtype=torch.long)}, r"\(1, 1, 1\) but the input has 1 rows"),
        ({"logits_to_keep": torch.ones(1, 4, dtype=torch.bool)}, r"a mask of shape \(1, 4\)"),
    ],
)
@pytest.mark.parametrize("language", ["mamba", "llama"])
def test_values_that_there_are_not_raise_with_both(language, inputs, message):
    model, _ = tiny_model("mlp", language=language)
    given = {"input_ids": [[1, 2, 3]], **inputs}
    with pytest.raises(ShapeError, match=message):
        model(**{**given, "input_ids": torch.tensor(given["input_ids"])})
