"""TRL's trainers, unmodified, over an export: they train on the processor's tokens, with the model's losses."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmamba.models  # noqa: F401  (registers vlmamba with the Auto classes)
from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.configuration import VLMambaConfig
from vlmamba.models.modeling import VLMambaForConditionalGeneration
from vlmamba.testing import tiny_model
from vlmamba.testing.models import tiny_vision_config

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LANGUAGES = ["mamba", "llama"]
masks_of_pictures = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL refuses assistant_only_loss with pictures before transformers 5.18",
)
RNG = np.random.default_rng(5)


def picture():
    return Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


# The second row has a history and text that looks like special tokens; the third has no picture.
PROMPTS = [
    ([user("\nWhat is it?")], [picture()]),
    ([user("Which two?"), says("Two <|endoftext|>."), user("\nWhere is <image>?")], [picture(), picture()]),
    ([user("How many digits?")], []),
]
CHOSEN = ["A red square.", "Top left.", "Two."]
REJECTED = ["No.", "A <image> and three black dots.", "Seven digits on a blue field."]


def messages_of(prompt, images, answer):
    """The conversation as a user of the processor writes it, pictures first."""
    parts = [*({"type": "image", "image": image} for image in images)]
    first, *rest = prompt
    head = {"role": "user", "content": [*parts, {"type": "text", "text": first["content"]}]}
    return [head, *rest, says(answer)]


CONVERSATIONS = [messages_of(*row, answer) for row, answer in zip(PROMPTS, CHOSEN, strict=True)]


@pytest.fixture(scope="module", params=LANGUAGES)
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for part in tiny_model("vss-l2", language=request.param):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture()
def parts(export):
    return AutoModelForImageTextToText.from_pretrained(export), AutoProcessor.from_pretrained(export)


@pytest.fixture()
def original(export):
    """The model as it was; a copy of one that a trainer has patched would still call that one."""
    return AutoModelForImageTextToText.from_pretrained(export).eval()


def settings(folder, **others):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 3,
        "seed": 1,
        "shuffle_dataset": False,
        **others,
    }


def no_shuffle(values):
    return {k: v for k, v in values.items() if k != "shuffle_dataset"}


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def reference_loss(model, processor, conversations, *, everything=False):
    """Our model's loss over the supervised tokens (or all) of conversations, each a row of its own."""
    total, count = 0.0, 0
    for conversation in conversations:
        encoded = processor.encode_messages(conversation)
        labels = torch.tensor([encoded.input_ids if everything else encoded.labels])
        batch = processor.apply_chat_template(conversation, tokenize=True, return_tensors="pt")
        assert batch["input_ids"][0].tolist() == encoded.input_ids
        with torch.no_grad():
            total += float(model(**batch, labels=labels, num_items=1).loss)
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def log_probability(model, processor, conversation):
    """Sum of the log-probabilities of the last answer's tokens."""
    encoded = processor.encode_messages(conversation)
    start = len(processor.encode_messages(conversation[:-1], add_generation_prompt=True).input_ids)
    batch = processor.apply_chat_template(conversation, tokenize=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[0].log_softmax(-1)
    return sum(float(scores[t - 1, encoded.input_ids[t]]) for t in range(start, len(encoded.input_ids)))


def check_rows(batch, wanted):
    """Rows of a collated batch are (ids, labels) as wanted, padding aside."""
    for ids, mask, labels, (wanted_ids, wanted_labels) in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], wanted, strict=True
    ):
        assert ids[mask].tolist() == wanted_ids
        assert labels[mask].tolist() == wanted_labels
        assert (labels[~mask] == -100).all()


# ---- supervised fine-tuning ----
def sft(model, processor, folder, rows, **others):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings(folder, **{"max_length": None, **others})),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )


def message_rows():
    return [
        {"messages": [*prompt, says(answer)], "images": images}
        for (prompt, images), answer in zip(PROMPTS, CHOSEN, strict=True)
    ]


@pytest.mark.parametrize("assistant_only", [pytest.param(True, marks=masks_of_pictures), False])
def test_sft_of_messages_trains_on_the_processors_labels(parts, original, tmp_path, assistant_only):
    model, processor = parts
    trainer = sft(model, processor, tmp_path, message_rows(), assistant_only_loss=assistant_only)
    encoded = [processor.encode_messages(c) for c in CONVERSATIONS]
    batch = trainer.data_collator(message_rows())
    check_rows(batch, [(e.input_ids, e.labels if assistant_only else e.input_ids) for e in encoded])
    assert batch["pixel_values"].shape[0] == 3
    trainer.train()
    expected = reference_loss(original, processor, CONVERSATIONS, everything=not assistant_only)
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-4)
    assert logged(trainer)[1] < logged(trainer)[0]


def test_sft_of_prompts_and_completions_trains_on_the_last_answer(parts, original, tmp_path):
    model, processor = parts

    def rows():
        return [
            {"prompt": prompt, "completion": [says(answer)], "images": images}
            for (prompt, images), answer in zip(PROMPTS, CHOSEN, strict=True)
        ]

    trainer = sft(model, processor, tmp_path, rows())
    wanted = []
    for conversation in CONVERSATIONS:
        encoded = processor.encode_messages(conversation)
        start = len(processor.encode_messages(conversation[:-1], add_generation_prompt=True).input_ids)
        wanted.append((encoded.input_ids, [-100] * start + encoded.labels[start:]))
    check_rows(trainer.data_collator(rows()), wanted)
    trainer.train()
    total = -sum(log_probability(original, processor, c) for c in CONVERSATIONS)
    count = sum(label != -100 for _, labels in wanted for label in labels)
    assert logged(trainer)[0] == pytest.approx(total / count, rel=1e-4)


TEXT_ROWS = [
    {"messages": [user("What is it?"), says("A red square.")]},
    {"messages": [user("So?"), says("Yes <image>."), user("Hm?"), says("Two, on a blue field.")]},
    {"messages": [user("How many digits are there?"), says("No.")]},
]


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({}, marks=pytest.mark.slow, id="padded"),
        pytest.param({"padding_free": True}, id="padding_free"),
        pytest.param({"packing": True, "max_length": 200}, marks=pytest.mark.slow, id="packed"),
        pytest.param({"packing": True, "max_length": 200, "pad_to_multiple_of": 16}, id="packed_padded"),
    ],
)
def test_sft_of_text_is_the_same_padded_packed_and_without_padding(parts, original, tmp_path, others):
    model, processor = parts
    trainer = sft(model, processor, tmp_path, TEXT_ROWS, assistant_only_loss=True, max_steps=1, **others)
    trainer.train()
    expected = reference_loss(original, processor, [row["messages"] for row in TEXT_ROWS])
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-4)


def test_rows_that_trl_would_cut_are_refused_with_what_to_set(parts, tmp_path):
    model, processor = parts
    trainer = sft(model, processor, tmp_path, message_rows(), max_length=100)
    with pytest.raises(ConfigError, match=r"more than max_length=100; vlmamba never cuts .*max_length=None"):
        trainer.train()
    longest = max(len(processor.encode_messages(c).input_ids) for c in CONVERSATIONS)
    sft(model, processor, tmp_path, message_rows(), max_length=longest, max_steps=1).train()


def test_sft_of_a_path_alone_and_its_result_loads_again(export, tmp_path):
    trainer = sft(export, None, tmp_path, message_rows())
    assert isinstance(trainer.model, VLMambaForConditionalGeneration)
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned")
    processor = AutoProcessor.from_pretrained(tmp_path / "tuned")
    batch = processor.apply_chat_template(CONVERSATIONS[1], tokenize=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


# ---- preferences ----
def dpo(model, processor, folder, **others):
    from trl import DPOConfig, DPOTrainer

    given = {k: others.pop(k) for k in ("ref_model", "peft_config") if k in others}
    rows = [
        {"prompt": prompt, "chosen": [says(good)], "rejected": [says(bad)], "images": images}
        for (prompt, images), good, bad in zip(PROMPTS, CHOSEN, REJECTED, strict=True)
    ]
    return DPOTrainer(
        model=model,
        args=DPOConfig(**no_shuffle(settings(folder, max_length=None, beta=0.5, **others))),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        **given,
    )


def preference_loss(model, reference, processor, beta=0.5):
    """-log sigmoid(beta (chosen - rejected)) of the log-probabilities' gains over the reference (DPO, eq. 7)."""
    found = []
    for (prompt, images), good, bad in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        gains = [
            log_probability(model, processor, messages_of(prompt, images, answer))
            - log_probability(reference, processor, messages_of(prompt, images, answer))
            for answer in (good, bad)
        ]
        found.append(-torch.nn.functional.logsigmoid(torch.tensor(beta * (gains[0] - gains[1]))).item())
    return sum(found) / len(found)


@pytest.mark.parametrize("reference", ["loaded", "given", "peft"])
def test_dpo_is_the_papers_loss_of_the_models_log_probabilities(parts, original, tmp_path, reference):
    model, processor = parts
    others = {}
    start = original
    if reference == "given":  # another one than the model, or the first loss is log 2 whatever is computed
        original = tiny_model("vss-l2", language=model.config.text_config.model_type, seed=9)[0]
        others["ref_model"] = copy.deepcopy(original)
    if reference == "peft":
        peft = pytest.importorskip("peft")
        others["peft_config"] = peft.LoraConfig(
            target_modules=r".*language_model.*\.(in_proj|x_proj|q_proj|v_proj)"
        )
    trainer = dpo(model, processor, tmp_path, **others)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(preference_loss(start, original, processor), rel=1e-4)
    if reference != "given":
        assert logged(trainer)[1] < logged(trainer)[0]
        good = [
            log_probability(original, processor, messages_of(*p, a))
            for p, a in zip(PROMPTS, CHOSEN, strict=True)
        ]
        assert logged(trainer, "logps/chosen")[0] == pytest.approx(sum(good) / len(good), rel=1e-4)
    if reference == "loaded":
        assert trainer.ref_model is not None
        kept = zip(trainer.ref_model.state_dict().values(), original.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in kept)


# ---- rewards ----
def test_grpo_scores_the_tokens_that_it_sampled(parts, original, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    model, processor = parts
    seen = []

    def reward(completions, completion_ids, **others):
        seen.append(completion_ids)
        return [float(len(set(ids))) for ids in completion_ids]

    rows = [{"prompt": prompt, "images": images} for prompt, images in PROMPTS[:2]]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            **no_shuffle(
                settings(tmp_path, per_device_train_batch_size=4, num_generations=2, max_completion_length=6)
            ),
            # A sampled image token would ask for a picture that is not there.
            generation_kwargs={"suppress_tokens": [processor.image_token_id]},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    kept = {}
    score = trainer._get_per_token_logps_and_entropies

    def record(model, input_ids, attention_mask, logits_to_keep, **others):
        out = score(model, input_ids, attention_mask, logits_to_keep, **others)
        kept.setdefault("first", (input_ids, attention_mask, others, out[0].detach()))
        return out

    trainer._get_per_token_logps_and_entropies = record
    trainer.train()
    assert len(seen) == 2
    assert all(processor.image_token_id not in ids for batch in seen for ids in batch)
    input_ids, mask, others, scores = kept["first"]
    pictures = list(others["pixel_values"].split(others["num_images"]))
    assert sorted(others["num_images"]) == [1, 1, 2, 2]
    for row in range(4):
        real = mask[row].bool()
        ids = input_ids[row][real]
        batch = {"input_ids": ids[None], "pixel_values": pictures[row]}
        with torch.no_grad():
            wanted = original(**batch).logits[0].log_softmax(-1)
        width = scores.shape[1]
        answered = int(real[-width:].sum())
        picked = wanted[len(ids) - answered - 1 : -1].gather(1, ids[-answered:, None])[:, 0]
        torch.testing.assert_close(scores[row, :answered], picked, rtol=1e-4, atol=1e-5)


# ---- the head that TRL puts in the place of ours ----
def soft_capped():
    from transformers import Gemma2Config

    text = Gemma2Config(
        vocab_size=368,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        final_logit_softcapping=0.3,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = VLMambaConfig(tiny_vision_config(), {"name": "mlp"}, text, image_token_id=360)
        return VLMambaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("language", [*LANGUAGES, "gemma2"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_fused_head_has_the_models_own_loss(language, padding_side):
    from trl.trainer.utils import add_fused_lm_head

    _, processor = tiny_model(language="mamba")
    model = soft_capped() if language == "gemma2" else tiny_model(language=language)[0]
    batch = processor.apply_chat_template(
        CONVERSATIONS,
        tokenize=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        padding_side=padding_side,
    )
    labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
    ours = model(**batch, labels=labels)
    fused = copy.deepcopy(model)
    add_fused_lm_head(fused)
    theirs = fused(**batch, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=1e-5, atol=0)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, a), b in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=name)


# ---- FlashAttention's words for packed rows ----
def packed(samples):
    lengths = [len(sample) for sample in samples]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.tensor([list(itertools.chain(*samples))]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("language", LANGUAGES)
@torch.no_grad()
def test_packed_rows_in_flash_attentions_words(language):
    model, _ = tiny_model(language=language)
    samples = [[5, 6, 7, 8], [9], [10, 11, 12], [13, 14]]
    batch = packed(samples)
    whole = model(**batch).logits[0]
    alone = torch.cat([model(input_ids=torch.tensor([sample])).logits[0] for sample in samples])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor([len(s) for s in samples]))[None]
    assert torch.equal(model(**batch, seq_idx=seq_idx.int()).logits[0], whole)
    wrong = {**batch, "cu_seq_lens_k": torch.tensor([0, 4, 5, 7, 10], dtype=torch.int32)}
    missing = {k: v for k, v in batch.items() if k != "position_ids"}
    for bad in (wrong, missing):
        for called in (model, model.model):
            with pytest.raises(ShapeError, match=r"cu_seq_lens_q, cu_seq_lens_k, .* tell of other samples"):
                called(**bad)
