"""VLMambaProcessor: ids and labels by construction, batches, Auto classes, errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlmamba.errors import ConfigError, DataError
from vlmamba.testing import tiny_processor

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def asks(text, image=True):
    head = [{"type": "image", "image": PICTURE}] if image else []
    return {"role": "user", "content": [*head, {"type": "text", "text": text}]}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def decode(processor, ids):
    return processor.tokenizer.decode([i for i in ids if i >= 0])


def test_supervised_ids_are_exactly_the_answers(processor):
    encoded = processor.encode_messages(
        [asks("\nWhat?"), says("Two."), asks("Where?", image=False), says("Top left.")]
    )
    labels = encoded.labels
    assert decode(processor, labels) == " Two.<|endoftext|> Top left.<|endoftext|>"
    assert all(label in (-100, i) for label, i in zip(labels, encoded.input_ids, strict=True))
    assert encoded.num_images == 1
    assert encoded.input_ids.count(processor.image_token_id) == processor.num_image_tokens


@pytest.mark.parametrize("chat", ["vicuna_v1", "plain", "mamba", "zephyr"])
def test_training_ids_begin_with_the_prompt_ids_of_inference(chat):
    processor = tiny_processor(chat=chat)
    history = [asks("\nWhat is it?"), says("A red square."), asks("Where?", image=False)]
    prompt = processor.encode_messages(history, add_generation_prompt=True).input_ids
    whole = processor.encode_messages([*history, says("Top left.")])
    assert whole.input_ids[: len(prompt)] == prompt
    assert all(label != -100 for label in whole.labels[len(prompt) : -1])


def test_several_images_anywhere_in_a_turn(processor):
    parts = [
        {"type": "text", "text": "left "},
        {"type": "image"},
        {"type": "text", "text": " right "},
        {"type": "image"},
    ]
    encoded = processor.encode_messages([{"role": "user", "content": parts}, says("yes")])
    ids = torch.tensor(encoded.input_ids)
    runs = (torch.diff((ids == processor.image_token_id).int()) == 1).sum()
    assert (encoded.num_images, int(runs)) == (2, 2)


def test_literal_tokens_of_users_are_never_special_ids(processor):
    encoded = processor.encode_messages([asks("is <image> or <|endoftext|> here?", image=False), says("no")])
    assert processor.image_token_id not in encoded.input_ids
    assert encoded.input_ids.count(processor.tokenizer.eos_token_id) == 1
    assert "is <image> or <|endoftext|> here?" in decode(processor, encoded.input_ids)


def test_tokenizer_gets_the_image_token_once(processor):
    again = type(processor)(
        processor.image_processor, processor.tokenizer, chat_template=processor.chat_template
    )
    assert again.image_token_id == processor.image_token_id


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_and_masked(processor, side):
    chats = [
        [asks("\nWhat?")],
        [asks("\nHow many digits are there?"), says("Two."), asks("Where?", image=False)],
    ]
    batch = processor.apply_chat_template(
        chats, tokenize=True, add_generation_prompt=True, return_tensors="pt", padding_side=side
    )
    singles = [processor.encode_messages(chat, add_generation_prompt=True).input_ids for chat in chats]
    for row, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles, strict=True):
        assert row[mask.bool()].tolist() == single
        assert mask[-1 if side == "left" else 0] == 1
    assert batch["pixel_values"].shape == (2, 3, 16, 16)


def test_ready_made_prompts(processor):
    batch = processor(images=PICTURE, text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens
    assert processor(text="no image")["input_ids"]


def test_counts_that_differ_are_named(processor):
    with pytest.raises(DataError, match=r"holds 2 <image> placeholder\(s\) but 1 image"):
        processor(images=[PICTURE], text="<image> and <image>")
    with pytest.raises(DataError, match=r"holds 0 <image> placeholder\(s\) but 1 image"):
        processor(images=PICTURE, text="none")


def test_nothing_is_ever_cut(processor):
    long = "USER: what is it? " * 20
    length = len(processor(text=long)["input_ids"][0])
    for options in ({"truncation": True, "max_length": length - 1}, {"max_length": length - 1}):
        with pytest.raises(ConfigError, match=rf"row 1 has {length} tokens, more than max_length={length - 1}"):
            processor(text=["a", long], **options)
    fits = processor(text=["a", long], truncation=True, max_length=length)
    free = processor(text=["a", long], truncation=False, max_length=length - 1)
    assert fits["input_ids"] == free["input_ids"] == processor(text=["a", long])["input_ids"]


def test_continue_final_message_leaves_the_answer_open(processor):
    text = processor.apply_chat_template([asks("What?"), says("It is")], continue_final_message=True)
    assert text.endswith("ASSISTANT: It is")


def test_saved_and_loaded_through_the_auto_class(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vlmamba"}')
    loaded = AutoProcessor.from_pretrained(tmp_path)
    messages = [asks("\nWhat?"), says("Two.")]
    assert type(loaded) is type(processor)
    assert loaded.encode_messages(messages) == processor.encode_messages(messages)
    assert loaded.num_image_tokens == processor.num_image_tokens


def test_a_sentencepiece_like_bos_is_added_once():
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    with_bos = type(processor)(
        processor.image_processor, tokenizer, chat_template=processor.chat_template, num_image_tokens=16
    )
    encoded = with_bos.encode_messages([asks("What?"), says("Two."), asks("So?", image=False), says("One.")])
    assert encoded.input_ids[0] == bos
    assert encoded.input_ids.count(bos) == 1
    assert encoded.labels[0] == -100
