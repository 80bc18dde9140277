"""transformers' own Trainer, unmodified, over an export: its losses are the model's, whatever the accumulation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import vlmamba.models  # noqa: F401  (registers vlmamba with the Auto classes)
from vlmamba.testing import tiny_model

pytest.importorskip("accelerate")
RNG = np.random.default_rng(3)
ANSWERS = (
    "A red square.",
    "Two.",
    "Top left, on a blue field.",
    "No.",
    "A green circle and three black dots.",
    "Six",
)


def conversation(answer, pictures):
    image = {"type": "image", "image": Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))}
    return [
        {"role": "user", "content": [*[image] * pictures, {"type": "text", "text": "\nWhat is it?"}]},
        {"role": "assistant", "content": answer},
    ]


ROWS = [conversation(answer, index % 3) for index, answer in enumerate(ANSWERS)]


@pytest.fixture(scope="module", params=["mamba", "llama"])
def export(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    for part in tiny_model("vss-l2", language=request.param):
        part.save_pretrained(folder)
    return folder


class Collator:
    """What a user writes: the processor's call, and labels by the mask it returns."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        batch = self.processor.apply_chat_template(
            rows, tokenize=True, return_tensors="pt", return_assistant_tokens_mask=True, padding_side="right"
        )
        labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)
        return {**batch, "labels": labels}


def trainer(export, folder, rows=ROWS, **settings):
    processor = AutoProcessor.from_pretrained(export)
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "seed": 1,
        **settings,
    }
    return Trainer(
        model=AutoModelForImageTextToText.from_pretrained(export),
        args=TrainingArguments(**arguments),
        data_collator=Collator(processor),
        train_dataset=rows,
        eval_dataset=rows[:3],
        processing_class=processor,
    )


def losses(made):
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def reference_loss(model, collator, rows):
    """Sum of all supervised tokens' cross entropies over their number, row by row, from the logits alone."""
    total, count = 0.0, 0
    for row in rows:
        batch = collator([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1]
        picked = labels != -100
        total += torch.nn.functional.cross_entropy(logits[picked], labels[picked], reduction="sum").item()
        count += int(picked.sum())
    return total / count


def test_training_lowers_the_loss_and_its_first_loss_is_the_models(export, tmp_path):
    made = trainer(export, tmp_path, max_steps=8, per_device_train_batch_size=6)
    expected = reference_loss(copy.deepcopy(made.model).eval(), made.data_collator, ROWS)
    made.train()
    found = losses(made)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.9 * found[0]


def test_accumulated_micro_batches_are_one_batch(export, tmp_path):
    """Rows differ in supervised tokens, so a mean of micro-batches' means would be another loss."""
    made = {
        steps: trainer(
            export,
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=6 // steps,
            gradient_accumulation_steps=steps,
        )
        for steps in (1, 3, 6)
    }
    for one in made.values():
        one.train()
    for steps in (3, 6):
        assert losses(made[steps]) == pytest.approx(losses(made[1]), rel=1e-4)
        pairs = zip(made[1].model.parameters(), made[steps].model.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=2e-4) for a, b in pairs)


def test_recomputation_changes_nothing(export, tmp_path):
    plain = trainer(export, tmp_path, max_steps=2, per_device_train_batch_size=3)
    again = trainer(
        export,
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    calls = []
    layer = next(
        m for m in again.model.language_model.modules() if type(m).__name__ in ("MambaMixer", "LlamaMLP")
    )
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for one in (plain, again):
        one.train()
    assert len(calls) == 4, "each of two steps runs a layer twice"
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)
    pairs = zip(plain.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("loss_only", [True, False])
def test_evaluation_gathers_logits_and_no_cache(export, tmp_path, loss_only):
    made = trainer(export, tmp_path, per_device_eval_batch_size=2, prediction_loss_only=loss_only)
    made.compute_metrics = None if loss_only else lambda found: {"shape": found.predictions.shape}
    found = made.evaluate()
    # Trainer's mean over rows of their batches' losses: of two rows, then of one
    losses_ = [reference_loss(made.model, made.data_collator, rows) for rows in (ROWS[:2], ROWS[2:3])]
    assert found["eval_loss"] == pytest.approx((2 * losses_[0] + losses_[1]) / 3, rel=1e-4)
    if not loss_only:
        width = max(made.data_collator([row])["input_ids"].shape[1] for row in ROWS[:3])
        assert found["eval_shape"] == (3, width, 368)


def test_a_checkpoint_of_trainer_is_an_export_and_resumes(export, tmp_path):
    settings = {"per_device_train_batch_size": 3, "max_steps": 3}
    whole = trainer(export, tmp_path / "whole", **settings)
    whole.train()
    half = trainer(export, tmp_path / "half", **settings, save_strategy="steps", save_steps=2)
    half.train()
    saved = tmp_path / "half/checkpoint-2"
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(saved),
        AutoProcessor.from_pretrained(saved),
    )
    assert processor.encode_messages(ROWS[1]) == half.processing_class.encode_messages(ROWS[1])
    assert type(model) is type(half.model)
    resumed = trainer(saved, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(saved))
    for other in (half, resumed):
        pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    assert losses(resumed)[-1] == pytest.approx(losses(whole)[-1], rel=1e-5)
