"""The evaluation harness on the playground's model: batches against single questions, shared prompts against anew.

    python benchmarks/eval.py                                     # the mini parts with a fresh connector
    python benchmarks/eval.py --checkpoint runs/quickstart/finetune
    python benchmarks/eval.py --quick

Answers of all batch sizes must be the same text, and likelihoods the same to 1e-5 of their size, before anything is
timed. A fresh connector answers nonsense, and longer than a trained one does; the work for a token is the same.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Case, DisagreementError, alternate, arguments, environment, finish
from PIL import Image

from vlmamba.common.load import load_model
from vlmamba.config import load_recipe
from vlmamba.evaluation import Sample, image_first, load_task
from vlmamba.evaluation.generation import Question, encode_question, generate_answers, model_inputs
from vlmamba.evaluation.likelihood import encode_options, score_options
from vlmamba.evaluation.runner import group_by_pictures
from vlmamba.models.builder import build_model

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("red", "blue", "three", "the seven")
TOLERANCE = 1e-5
BATCH = 32
NEW_TOKENS = 8


def main(words: Sequence[str] | None = None) -> int:
    """Run both comparisons."""
    parser = arguments(__doc__ or "", "eval")
    parser.add_argument(
        "--checkpoint", help="a run or an export; the mini parts with a fresh connector by default"
    )
    parser.add_argument("--questions", type=int, help="about how many questions (128; quick: 32)")
    parser.add_argument("--rounds", type=int, help="rounds in which all contenders run (9; quick: 3)")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    model, processor = _model(options.checkpoint)
    model.to(options.device)
    samples = _samples(options.questions or (32 if options.quick else 128))
    rounds = options.rounds or (3 if options.quick else 9)
    cases = [
        _generation(model, processor, samples, rounds, options.device),
        _likelihood(model, processor, samples, rounds, options.device),
    ]
    finish("eval", options.out, cases, environment(options.device, options.threads))
    return 0


def _model(checkpoint: str | None) -> tuple[Any, Any]:
    if checkpoint is not None:
        return load_model(checkpoint)
    torch.manual_seed(0)
    model, processor = build_model(load_recipe(f"{ROOT / 'train/playground.py'}:finetune", []).config.model)
    return model.eval(), processor


def _samples(count: int) -> list[Sample]:
    """Held-out questions of the playground, their pictures open; drawn shapes where they were not made yet."""
    file = ROOT / "playground/data/mini/heldout/questions.jsonl"
    if not file.is_file():
        colours = ("red", "blue", "green")
        return [
            Sample(
                i,
                (Image.new("RGB", (64, 64), colours[i % 3]),),
                f"What is in picture {i}?" + " Where?" * (i % 4),
            )
            for i in range(count)
        ]
    chosen = load_task(str(ROOT / "eval/playground.py"), annotations=str(file)).samples
    groups = group_by_pictures(chosen)
    pictures = max(1, len(groups) * count // len(chosen))
    groups = [groups[at * len(groups) // pictures] for at in range(pictures)]  # spread over the file
    chosen = [sample for group in groups for sample in group]
    opened = {
        i: Image.open(i).convert("RGB") for sample in chosen for i in sample.images if isinstance(i, Path)
    }
    return [dataclasses.replace(s, images=tuple(opened[i] for i in s.images)) for s in chosen]


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """As the runner makes them: questions about the same pictures together."""
    by_key = {question.sample.key: question for question in questions}
    groups = [[by_key[s.key] for s in group] for group in group_by_pictures([q.sample for q in questions])]
    groups.sort(key=lambda group: -max(len(q.input_ids) for q in group))
    ordered = [question for group in groups for question in group]
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def _generation(model: Any, processor: Any, samples: Sequence[Sample], rounds: int, device: str) -> Case:
    questions = [encode_question(processor, sample, image_first(sample)) for sample in samples]

    def ask(size: int) -> Callable[[], list[tuple[str, int]]]:
        def run() -> list[tuple[str, int]]:
            return [
                (reply.text, reply.tokens)
                for batch in _batches(questions, size)
                for reply in generate_answers(model, processor, batch, max_new_tokens=NEW_TOKENS)
            ]

        return run

    contenders = {f"batch {size}": ask(size) for size in (1, 8, BATCH)}
    answers = {name: run() for name, run in contenders.items()}
    for name, given in answers.items():
        if given != answers["batch 1"]:
            different = sum(a != b for a, b in zip(given, answers["batch 1"], strict=True))
            raise DisagreementError(
                f"generation: {name} answers {different} of {len(questions)} questions differently from batch 1. "
                "Nothing of this case is timed."
            )
    timings = alternate(contenders, rounds=rounds, device=device, sample_seconds=0, budget=120)
    pictures = len(group_by_pictures(samples))
    tokens = sum(count for _, count in answers["batch 1"])
    return Case(
        f"Greedy answers to {len(questions)} questions on {pictures} sets of pictures ({tokens} new tokens)",
        f"batch {BATCH}",
        timings,
        unit="questions",
        work=len(questions),
        notes=["The same answers, token for token, at all sizes."],
    )


def _likelihood(model: Any, processor: Any, samples: Sequence[Sample], rounds: int, device: str) -> Case:
    questions = [encode_options(processor, sample, image_first(sample), OPTIONS) for sample in samples]

    def shared() -> list[float]:
        return [
            score.total
            for batch in _batches(questions, BATCH)
            for scores in score_options(model, processor, batch)
            for score in scores
        ]

    def anew() -> list[float]:
        return [total for batch in _batches(questions, BATCH) for total in _plain(model, processor, batch)]

    # Relative: a log-probability of -70 in fp32 is rounded by 4e-6, and products of other shapes may round otherwise.
    worst = max(abs(a - b) / max(abs(b), 1.0) for a, b in zip(shared(), anew(), strict=True))
    if not worst <= TOLERANCE:
        raise DisagreementError(
            f"likelihood: a shared prompt state is off by {worst:.1e} of a log-probability, {TOLERANCE:.0e} is "
            "allowed. Nothing of this case is timed."
        )
    contenders = {"prompt scanned once": shared, "prompt anew for every option": anew}
    return Case(
        f"Likelihood of {len(OPTIONS)} options of {len(questions)} questions, batch {BATCH}",
        "prompt scanned once",
        alternate(contenders, rounds=rounds, device=device, sample_seconds=0, budget=120),
        unit="questions",
        work=len(questions),
        notes=[f"Largest difference of a log-probability, relative: {worst:.1e}."],
    )


def _plain(model: Any, processor: Any, batch: Sequence[Question]) -> list[float]:
    """The same sums with every option in a row of its own behind the whole prompt and picture."""
    totals = []  # one pass an option, all of its rows together
    for which in range(len(OPTIONS)):
        rows = [Question(q.sample, q.input_ids + list(q.options[which])) for q in batch]
        lengths = [len(q.options[which]) for q in batch]
        keep = max(lengths) + 1
        with torch.inference_mode():
            logits = model(**model_inputs(model, processor, rows), logits_to_keep=keep).logits.log_softmax(-1)
        ids = [row.input_ids[-length:] for row, length in zip(rows, lengths, strict=True)]
        totals.append(
            [
                logits[at, -length - 1 : -1].double()[range(length), ids[at]].sum().item()
                for at, length in enumerate(lengths)
            ]
        )
    return [totals[which][at] for at in range(len(batch)) for which in range(len(OPTIONS))]


if __name__ == "__main__":
    sys.exit(main())
