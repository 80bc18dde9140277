"""Training of the playground's mini Mamba language model, on text alone (called by ``build_mini.py``).

It learns the playground's language: captions, dialogues in several chat formats, small sums.  Dialogues and
captions come with a description in front of them (reading) or with nothing (then answers can only follow the
priors).  A description is another caption, or loose notes: the words of one fact ("red", "7", "top", "left")
together in one position, as the sum of their embeddings, some of them several times, with empty positions
between.  Reading notes teaches to take several words from one position, which no plain text does.  No picture
is drawn and none is seen: scenes serve as facts to talk about.

Shapes: B rows, L positions a row (packed from several texts, told apart by ``seq_idx``), W words a position.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from phrases import DESCRIBE, SHARES, SHORT_ANSWER, caption, dialogue, pair_dialogue, small_talk
from scenes import Scene, digit_pools, sample_scene
from torch import Tensor, nn
from tqdm import tqdm
from transformers import MambaConfig, PreTrainedTokenizerFast

from vlmamba.models.language import MambaLM

logger = logging.getLogger(__name__)

END = "<|endoftext|>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Pieces = list[tuple[str, bool]]  # text, and whether it is an answer
WORDS = 4  # most words of one position
EMPTY = -1


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one mix of texts; the learning rate starts over in each."""

    steps: int
    notes: float  # share of texts that begin with notes
    questions: Mapping[str, float] = field(default_factory=lambda: SHARES)  # shares of the categories


# The eight colours' embeddings begin almost parallel, so looking colours up is learnt last: it gets a phase.
COLOURS_FIRST = {"colour": 0.8, "digit": 0.1, "position": 0.1}
PLACES = {"digit": 0.3, "colour": 0.1, "position": 0.45, "count": 0.05, "exists": 0.1}
DIGITS = {"digit": 0.4, "colour": 0.3, "position": 0.17, "count": 0.03, "exists": 0.1}
BALANCED = {"digit": 0.3, "colour": 0.25, "position": 0.25, "count": 0.08, "exists": 0.12}


@dataclass(frozen=True)
class LanguageTraining:
    """How the language model is trained; every row is fresh."""

    phases: tuple[Phase, ...] = (
        Phase(3000, 0.0),
        Phase(1400, 0.7),
        Phase(2300, 0.7),
        Phase(700, 0.9, COLOURS_FIRST),
        Phase(5000, 0.8, BALANCED),
        Phase(3000, 0.8, PLACES),
        Phase(4000, 0.85, DIGITS),
    )
    rows: int = 16
    row_tokens: int = 256
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    other_weight: float = 0.2  # weight of tokens that are no answer
    seed: int = 0
    save_every: int = 200

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> tuple[Phase, int]:
        """The phase that a step belongs to, and the step's place within it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(step)


def language_config(vocab_size: int) -> MambaConfig:
    """Four layers of width 128, 0.5 M parameters; padded vocabulary with room for ``<image>``."""
    return MambaConfig(
        vocab_size=(vocab_size + 1 + 7) // 8 * 8,
        hidden_size=128,
        num_hidden_layers=4,
        state_size=16,
        expand=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def chat(pairs: list[tuple[str, str]], rng: Generator) -> Pieces:
    """A dialogue in one of four chat formats, answers marked."""
    draw = rng.random()
    if draw < 0.85:  # Vicuna's, in two of five cases with its system prompt
        pieces: Pieces = [(f"{SYSTEM} ", False)] if draw < 0.34 else []
        for question, answer in pairs:
            pieces += [(f"USER: {question} ASSISTANT:", False), (f" {answer}{END}", True)]
        return pieces
    pieces = []
    for question, answer in pairs:
        if draw < 0.95:
            pieces += [(f"User: {question}\nAssistant:", False), (f" {answer}{END}", True), ("\n", False)]
        else:
            pieces += [(f"<|user|>\n{question}{END}\n<|assistant|>\n", False), (f"{answer}{END}", True)]
            pieces += [("\n", False)]
    return pieces


def notes(scene: Scene, rng: Generator) -> list[str]:
    """Loose notes of a scene: the words of one fact at each position, one to six times, empty positions between."""
    positions = [""] * int(rng.integers(0, 12))
    for digit in scene.digits:
        fact = f" {digit.colour} {digit.value} {digit.place}"
        positions += [fact] * int(rng.integers(1, 7))
    return [positions[int(i)] for i in rng.permutation(len(positions))]


def noted(rng: Generator, pool: tuple[int, ...], shares: Mapping[str, float]) -> tuple[list[str], Pieces]:
    """Notes of a scene, or of two, and a text about them: a caption, or a dialogue with a caption at its end."""
    scene, other = sample_scene(rng, pool), sample_scene(rng, pool)
    draw = rng.random()
    if draw < 0.3:
        return notes(scene, rng), [(caption(scene, rng), True), ("\n", False)]
    if draw < 0.4:
        pairs = [(q.text, q.answer) for q in pair_dialogue(scene, other, rng, int(rng.integers(2, 5)))]
        return [*notes(scene, rng), *notes(other, rng)], chat(pairs, rng)
    pairs = [(q.text, q.answer) for q in dialogue(scene, rng, int(rng.integers(4, 10)), shares)]
    if rng.random() < 0.3:
        pairs.append((DESCRIBE[int(rng.integers(len(DESCRIBE)))], caption(scene, rng)))
    return notes(scene, rng), chat(pairs, rng)


def text(rng: Generator, pool: tuple[int, ...], shares: Mapping[str, float]) -> Pieces:
    """One text at random: reading, reading about two scenes, blind dialogue, captions, or small talk."""
    draw, scene = rng.random(), sample_scene(rng, pool)
    suffix = f"\n{SHORT_ANSWER}" if rng.random() < 0.2 else ""
    if draw < 0.15:
        return [(caption(scene, rng) + (END if rng.random() < 0.5 else f"\n{END}"), False)]
    if draw < 0.23:
        return chat([small_talk(rng) for _ in range(int(rng.integers(1, 5)))], rng)
    if draw < 0.27:
        return chat([(DESCRIBE[int(rng.integers(len(DESCRIBE)))], caption(scene, rng))], rng)
    if draw < 0.42:
        other = sample_scene(rng, pool)
        pairs = [(q.text, q.answer) for q in pair_dialogue(scene, other, rng, int(rng.integers(2, 5)))]
        described = f"{caption(scene, rng)}\n{caption(other, rng)}\n"
    else:
        pairs = [(q.text, q.answer) for q in dialogue(scene, rng, int(rng.integers(3, 8)), shares)]
        described = f"{caption(scene, rng)}\n"
    if not pairs:
        return [(caption(scene, rng) + END, False)]
    if rng.random() < 0.2:
        described = ""
    return chat([(described + pairs[0][0] + suffix, pairs[0][1]), *pairs[1:]], rng)


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: LanguageTraining, start: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Packed rows: ids (B, L, W), seq_idx and weights (B, L); batch ``i`` depends on (seed, i) alone."""
    pool, _ = digit_pools()
    for index in range(start, recipe.steps):
        rng = np.random.default_rng([recipe.seed, 7, index])
        phase, _ = recipe.phase(index)
        shape = (recipe.rows, recipe.row_tokens)
        ids, segments = np.full((*shape, WORDS), EMPTY, np.int64), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        for row in range(recipe.rows):
            filled, segment = 0, 0
            while filled < recipe.row_tokens:
                first = True
                with_notes = phase.notes > 0 and rng.random() < phase.notes
                shares = phase.questions
                positions, pieces = noted(rng, pool, shares) if with_notes else ([], text(rng, pool, shares))
                for words in positions[: recipe.row_tokens - filled]:
                    together = tokenizer(words).input_ids[:WORDS] if words else []
                    ids[row, filled, : len(together)] = together
                    segments[row, filled] = segment
                    filled, first = filled + 1, False
                for words, answer in pieces:
                    piece = tokenizer(words).input_ids[: recipe.row_tokens - filled]
                    here = slice(filled, filled + len(piece))
                    ids[row, here, 0], segments[row, here] = piece, segment
                    weights[row, here] = 1.0 if answer else recipe.other_weight
                    if first and piece:  # nothing in its own text comes before the first token
                        weights[row, filled], first = 0.0, False
                    filled += len(piece)
                segment += 1
        yield torch.from_numpy(ids), torch.from_numpy(segments), torch.from_numpy(weights)


def embed(model: MambaLM, ids: Tensor) -> Tensor:
    """(B, L, W) words to (B, L, D): the sum of the embeddings of a position's words, zero where there is none."""
    return (model.get_input_embeddings()(ids.clamp(min=0)) * (ids >= 0)[..., None]).sum(2)


def phase_rate(step: int, recipe: LanguageTraining) -> float:
    """Linear warm-up, then cosine to zero, in each phase."""
    phase, step = recipe.phase(step)
    steps = phase.steps
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    return (
        recipe.lr * 0.5 * (1.0 + math.cos(math.pi * (step - recipe.warmup) / max(steps - recipe.warmup, 1)))
    )


def train_language(tokenizer: PreTrainedTokenizerFast, recipe: LanguageTraining, work: Path) -> MambaLM:
    """Train the language model; resumes from ``work/language.pt`` where there is one."""
    torch.manual_seed(recipe.seed)
    model = MambaLM(language_config(len(tokenizer)))
    model.train()
    named = dict(model.named_parameters())
    plain = [p for n, p in named.items() if p.ndim < 2 or "A_log" in n or "embeddings" in n]
    decayed = [p for p in named.values() if not any(p is other for other in plain)]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    state_file, start, spent = work / "language.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    mean: dict[str, float] = {}
    began = time.monotonic() - spent
    stream = batches(tokenizer, recipe, start)
    progress = tqdm(stream, initial=start, total=recipe.steps, desc="language", mininterval=5)
    for step, (ids, segments, weights) in enumerate(progress, start=start):
        for group in optimizer.param_groups:
            group["lr"] = phase_rate(step, recipe)
        logits = model(inputs_embeds=embed(model, ids), seq_idx=segments).logits[:, :-1].float()
        target, weight = ids[:, 1:, 0].clamp(min=0), weights[:, 1:]
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        loss = (each * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            answers = weight == 1.0
            right = (logits.argmax(-1) == target)[answers & (target != 0)].float().mean()
        for name, term in {"loss": loss.detach(), "answers_right": right}.items():
            mean[name] = 0.98 * mean.get(name, float(term)) + 0.02 * float(term)
        progress.set_postfix({name: f"{value:.3f}" for name, value in mean.items()}, refresh=False)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": time.monotonic() - began}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    logger.info("language model: %d steps, %.0f s", recipe.steps, time.monotonic() - began)
    return model
