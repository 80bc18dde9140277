"""VLMambaProcessor: ids and labels by construction, batches, Auto classes, errors."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
        with pytest.raises(
            ConfigError, match=rf"row 1 has {length} tokens, more than max_length={length - 1}"
        ):
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


@pytest.fixture(scope="module")
def with_bos():
    """A processor whose tokenizer puts a BOS before any text, as Llama's does."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return type(processor)(
        processor.image_processor, tokenizer, chat_template=processor.chat_template, num_image_tokens=16
    )


def test_a_sentencepiece_like_bos_is_added_once(with_bos):
    bos = with_bos.tokenizer.bos_token_id
    encoded = with_bos.encode_messages([asks("What?"), says("Two."), asks("So?", image=False), says("One.")])
    assert encoded.input_ids[0] == bos
    assert encoded.input_ids.count(bos) == 1
    assert encoded.labels[0] == -100


def test_a_bos_stands_before_prompts_and_not_before_completions(with_bos):
    bos = with_bos.tokenizer.bos_token_id
    chat = [asks("What?", image=False), says("Two.")]
    wanted = with_bos.encode_messages(chat).input_ids
    text = with_bos.apply_chat_template(chat)
    assert (
        with_bos(text=text)["input_ids"]
        == with_bos(text=text, add_special_tokens=False)["input_ids"]
        == [wanted]
    )
    assert with_bos(text="Two.")["input_ids"][0][0] == bos
    assert bos not in with_bos(text="Two.", add_special_tokens=False)["input_ids"][0]
    options = {"processor_kwargs": {"add_special_tokens": False}}  # as TRL has it
    assert with_bos.apply_chat_template(chat, tokenize=True, **options)["input_ids"] == [wanted]


def test_the_template_may_write_the_bos_itself(with_bos):
    template = "{{ bos_token }}" + with_bos.chat_template
    chat = [asks("What?", image=False), says("Two.")]
    rows = with_bos.apply_chat_template(chat, chat_template=template, tokenize=True)["input_ids"]
    assert rows == [with_bos.encode_messages(chat).input_ids]


# ---- the same row by every way ----
WORDS = ["What", " is", "\n", " ", "<image>", "<|endoftext|>", "USER:", "<s", "seven", "\u00e9", "\U0001f600"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
CHATS = st.lists(st.tuples(TEXTS, st.integers(0, 2), TEXTS), min_size=1, max_size=3)


def turns(chat):
    for text, pictures, answer in chat:
        parts = [{"type": "image", "image": PICTURE}] * pictures + [{"type": "text", "text": text}]
        yield {"role": "user", "content": parts}
        yield {"role": "assistant", "content": [{"type": "text", "text": answer}]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(chats=st.lists(CHATS, min_size=1, max_size=3), side=st.sampled_from(["left", "right"]))
def test_rows_and_masks_of_a_batch_are_those_of_each_conversation(chats, side):
    processor = tiny_processor(num_image_tokens=2)
    messages = [list(turns(chat)) for chat in chats]
    options = {"padding_side": side, "pad_to_multiple_of": 8}
    batch = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=options,
    )
    assert batch["input_ids"].shape[1] % 8 == 0
    for row, chat in enumerate(messages):
        encoded = processor.encode_messages(chat)
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row]
        labels = ids.masked_fill(batch["assistant_masks"][row] == 0, -100)
        assert ids[real].tolist() == encoded.input_ids
        assert labels[real].tolist() == encoded.labels
        assert (labels[~real] == -100).all()
        answers = [(f" {answer}" if answer else "") + "<|endoftext|>" for _, _, answer in chats[row]]
        assert decode(processor, encoded.labels) == "".join(answers)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(chat=CHATS, name=st.sampled_from(["vicuna_v1", "mamba", "zephyr", "plain"]))
def test_prompt_and_completion_as_text_are_the_ids_of_the_conversation(chat, name):
    """As TRL goes: both rendered, the prompt's text cut off, each tokenised on its own and joined."""
    processor = tiny_processor(num_image_tokens=2, chat=name)
    if name != "vicuna_v1":  # there an answer follows a newline, with which white space would merge
        chat = [(text, pictures, answer.strip()) for text, pictures, answer in chat]
    *prompt, answer = turns(chat)
    start = processor.apply_chat_template(prompt, add_generation_prompt=True)
    whole = processor.apply_chat_template([*prompt, answer])
    assert whole.startswith(start)
    pictures = [PICTURE] * sum(count for _, count, _ in chat)
    first = processor(
        images=pictures, text=[start], padding=True, padding_side="left", add_special_tokens=False
    )
    last = processor(text=[whole[len(start) :]], padding=True, padding_side="right", add_special_tokens=False)
    encoded = processor.encode_messages([*prompt, answer])
    assert first["input_ids"][0] + last["input_ids"][0] == encoded.input_ids


# ---- what callers ask for ----
def test_one_row_is_a_batch_of_one(processor):
    chat = [asks("\nWhat?"), says("Two.")]
    rows = processor.apply_chat_template(chat, tokenize=True)
    assert rows["input_ids"] == [processor.encode_messages(chat).input_ids]
    assert rows["input_ids"] == processor.apply_chat_template([chat], tokenize=True)["input_ids"]
    assert processor.apply_chat_template(chat, tokenize=True, return_dict=False) == rows["input_ids"]
    assert isinstance(processor.apply_chat_template(chat), str)
    assert isinstance(processor.apply_chat_template([chat]), list)


def test_rows_are_padded_only_if_tensors_or_padding_are_asked_for(processor):
    texts = ["What?", "What is in the image?"]
    lengths = [len(processor(text=t)["input_ids"][0]) for t in texts]

    def widths(**options):
        return [len(row) for row in processor(text=texts, **options)["input_ids"]]

    assert lengths[0] < lengths[1]
    assert widths() == widths(padding=False) == widths(padding="do_not_pad") == lengths
    assert widths(padding=True) == widths(return_tensors="pt") == [max(lengths)] * 2
    assert widths(padding="max_length", max_length=40) == [40, 40]
    assert (
        widths(text_kwargs={"padding": True, "pad_to_multiple_of": 16}) == [-(-max(lengths) // 16) * 16] * 2
    )


@pytest.mark.parametrize(
    "idle",
    [
        {"truncation": False, "max_length": None, "return_token_type_ids": False, "add_special_tokens": True},
        {
            "truncation": True,
            "return_mm_token_type_ids": False,
            "return_attention_mask": True,
            "verbose": False,
        },
        {"stride": 0, "is_split_into_words": False, "videos": None, "audio": None, "return_length": False},
        {
            "images_kwargs": {"do_resize": None},
            "text_kwargs": None,
            "common_kwargs": {"return_tensors": None},
        },
    ],
)
def test_what_asks_for_nothing_changes_nothing(processor, idle):
    assert processor(text="What?", **idle).data == processor(text="What?").data
    chat = [asks("What?"), says("Two.")]
    rows = processor.apply_chat_template(
        chat, tokenize=True, tools=None, documents=None, processor_kwargs=idle
    )
    assert rows["input_ids"] == processor.apply_chat_template(chat, tokenize=True)["input_ids"]


@pytest.mark.parametrize(
    ("asked", "says_"),
    [
        ({"return_token_type_ids": True}, "return_token_type_ids=True"),
        ({"do_resize": False}, "do_resize=False"),
        ({"images_kwargs": {"size": 8}}, "size=8"),
        ({"paddding": True}, r"paddding=True.*Did you mean 'padding'"),
        ({"stride": 3}, "stride=3"),
        ({"padding": "left"}, "padding='left'"),
        ({"padding_side": "both"}, "padding_side='both'"),
        ({"padding": "max_length"}, "needs max_length"),
    ],
)
def test_what_would_change_the_result_is_refused_by_name(processor, asked, says_):
    with pytest.raises(ConfigError, match=says_):
        processor(text="What?", **asked)
    with pytest.raises(ConfigError, match=says_):
        processor.apply_chat_template([asks("What?")], tokenize=True, **asked)


def test_variables_go_to_templates_that_have_them(processor):
    chat = [asks("What?", image=False)]
    with pytest.raises(
        ConfigError, match=r"does not take tools=.*chat template has no variable of that name"
    ):
        processor.apply_chat_template(chat, tools=[{"name": "look"}])
    template = "{% if tools %}{{ tools[0].name }}: {% endif %}" + processor.chat_template
    text = processor.apply_chat_template(chat, chat_template=template, tools=[{"name": "look"}])
    assert text == "look: " + processor.apply_chat_template(chat)


def test_masks_need_a_template_that_says_what_the_model_says(processor):
    template = processor.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    chat = [asks("What?", image=False), says("Two.")]
    with pytest.raises(ConfigError, match="does not say what the model is to say"):
        processor.apply_chat_template(
            chat, chat_template=template, tokenize=True, return_assistant_tokens_mask=True
        )


def test_pictures_of_rows_are_counted_row_by_row(processor):
    texts = ["<image> and <image>", "none"]
    assert processor(images=[[PICTURE, PICTURE], []], text=texts)["pixel_values"].shape[0] == 2
    assert processor(images=[PICTURE, PICTURE], text=texts)["pixel_values"].shape[0] == 2
    with pytest.raises(
        DataError, match=r"rows hold \[2, 0\] <image> placeholder\(s\) but come with \[1, 1\]"
    ):
        processor(images=[[PICTURE], [PICTURE]], text=texts)


def test_pictures_of_any_kind_are_the_same_picture(processor, tmp_path):
    path = tmp_path / "picture.png"
    PICTURE.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    parts = [
        {"type": "image", "image": PICTURE, "text": None, "path": None},
        {"type": "image", "image": np.asarray(PICTURE)},
        {"type": "image", "image": path},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": str(path)},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "image_url", "image_url": str(path)},
        {"type": "image", "image": io.BytesIO(path.read_bytes()).getvalue()},
    ]
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "same?", "image": None}]}]
    pixels = processor.apply_chat_template(chat, tokenize=True, return_tensors="pt")["pixel_values"]
    assert len(pixels) == len(parts)
    assert (pixels == pixels[0]).all()
    with pytest.raises(DataError, match="none of the keys 'image', 'path', 'url', 'base64'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)


# ---- what a conversation may hold ----
def user(*parts, **keys):
    return [{"role": "user", "content": list(parts), **keys}]


WORDS_PART = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("chat", "says_"),
    [
        ("What?", "a conversation is a list of messages, not 'W'"),
        ([], r"a conversation is a list of messages, not \[\]"),
        ([["What?"]], "message 0 is 'What\\?', not a dictionary"),
        ([{"content": "What?"}], "message 0 has no role"),
        ([{"role": "user", "content": None}], r"message 0 \(of the user\): content is None, not a text"),
        ([{"role": "user"}], "content is None"),
        ([{"role": "user", "content": 3}], "content is 3"),
        ([{"role": "user", "content": WORDS_PART}], "content is {'type': 'text'"),
        (
            [*user(WORDS_PART), {"role": "assistant", "content": "a", "contnt": "b"}],
            r"message 1 .*'contnt' has no meaning here. Did you mean 'content'",
        ),
        (user(WORDS_PART, name="Ann"), "'name' has no meaning here"),
        (user(WORDS_PART, image="a.png"), "'image' has no meaning here"),
        (user(WORDS_PART, tool_calls=[{"x": 1}]), "'tool_calls' has no meaning here"),
        (user("What?"), "part 0 is 'What\\?', not a dictionary"),
        (
            user(WORDS_PART, {"type": "img"}),
            r"part 1 is of type 'img', which is not known here. Did you mean 'image'",
        ),
        (user({"type": "video", "video": "v.mp4"}), "is of type 'video'"),
        (user({"type": "input_image", "image_url": "a.png"}), "is of type 'input_image'"),
        (user({"text": "What?"}), "is of type None"),
        (user({"type": "text"}), "text is None, not a text"),
        (user({"type": "text", "text": ["a"]}), r"text is \['a'\], not a text"),
        (user({"type": "text", "text": "a", "cache_control": {}}), "'cache_control' has no meaning here"),
        (user({"type": "image", "imgae": "a.png"}), "'imgae' has no meaning here. Did you mean 'image'"),
        (user({"type": "image", "image": PICTURE, "path": "a.png"}), "holds several images: image, path"),
        (user({"type": "image_url", "url": "a.png"}), "'url' has no meaning here"),
        (user({"type": "image_url", "image_url": {"path": "a.png"}}), "'path' has no meaning here"),
        (
            user({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
            "'detail' has no meaning",
        ),
        (user({"type": "image_url", "image_url": None}), "image_url holds no url"),
        (user({"type": "image", "index": 1}, {"type": "image", "index": 0}), "in the order of their parts"),
    ],
)
def test_nothing_of_a_conversation_is_dropped(processor, chat, says_):
    for tokenize in (False, True):
        with pytest.raises(DataError, match=says_):
            processor.apply_chat_template(chat, tokenize=tokenize)
    if isinstance(chat, list) and chat and isinstance(chat[0], dict):
        with pytest.raises(DataError, match=says_):
            processor.encode_messages(chat)


def test_what_other_tools_write_is_understood(processor, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    wanted = processor.apply_chat_template(
        user({"type": "image", "image": PICTURE}, WORDS_PART), tokenize=True, return_tensors="pt"
    )
    for part in (
        {"type": "image_url", "image_url": {"url": path, "detail": "auto"}},  # OpenAI
        {"type": "image", "image": path, "index": 0, "text": None},  # vsft
        {"type": "image", "path": path, "url": None, "base64": None},  # a table's row
    ):
        got = processor.apply_chat_template(user(part, WORDS_PART), tokenize=True, return_tensors="pt")
        assert got["input_ids"].tolist() == wanted["input_ids"].tolist()
        assert torch.equal(got["pixel_values"], wanted["pixel_values"])
    # LLaVA-NeXT: places in the chat, pictures beside the text
    text = processor.apply_chat_template(user({"type": "image"}, WORDS_PART))
    got = processor(images=path, text=text, return_tensors="pt")
    assert got["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert torch.equal(got["pixel_values"], wanted["pixel_values"])


def test_keys_that_a_template_looks_up_are_its_own(processor):
    chat = user(WORDS_PART, name="Ann")
    for look in ("m.name", "m['name']", "m.get('name')"):
        template = "{% for m in messages %}{{ " + look + " }}: {{ m.content[0].text }}{% endfor %}"
        assert processor.apply_chat_template(chat, chat_template=template) == "Ann: What?"


@pytest.mark.parametrize(
    "wrong",
    [
        "{{ sistem }}",
        "{{ messages[0].contnt }}",
        "{% for m in mesages %}{% endfor %}",
        "{{ 'a' + b }}",
        "{{ messages[0].content[0].text + 1 }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_does_not_know_raises(processor, wrong):
    with pytest.raises(DataError, match="the chat template refuses this conversation"):
        processor.apply_chat_template(user(WORDS_PART), chat_template=wrong)
    maybe = "{% if tools %}no{% endif %}{% if messages[0].tool_calls is defined %}no{% endif %}yes"
    assert processor.apply_chat_template(user(WORDS_PART), chat_template=maybe) == "yes"


def test_an_answer_without_loss_is_not_supervised(processor):
    chat = [
        asks("What?", image=False),
        {**says("one"), "loss": False},
        asks("And?", image=False),
        says("two"),
    ]
    whole = processor.encode_messages([{k: v for k, v in m.items() if k != "loss"} for m in chat])
    part = processor.encode_messages(chat)
    assert part.input_ids == whole.input_ids
    assert decode(processor, part.labels) == " two<|endoftext|>"
    masks = processor.apply_chat_template(chat, tokenize=True, return_assistant_tokens_mask=True)[
        "assistant_masks"
    ][0]
    assert [bool(mask) for mask in masks] == [label != -100 for label in part.labels]
