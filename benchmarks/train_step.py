"""A whole stage-2 training step: vlmamba against transformers' LLaVA with a Mamba language model.

    python benchmarks/train_step.py               # the playground's size and 130M
    python benchmarks/train_step.py playground --quick

Both hold the same weights (SigLIP tower, frozen; two-layer MLP connector; Mamba), see the same ragged batch, and take
the same AdamW step. Before anything is timed, the loss, every gradient and every updated weight are compared.

transformers' scan indexes the time axis at every step, so its backward is quadratic in the length, and any ratio to it
grows with the batch's rows. A third contender is therefore transformers with that loop made linear (`unbind`) and
nothing else changed: the ratio to it is what vlmamba's own work is worth.

Shapes: B rows, L length, T visual tokens an image, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _common import (
    Case,
    DisagreementError,
    alternate,
    arguments,
    check_same,
    environment,
    finish,
)
from _contenders import linear_transformers_scan
from torch import Tensor, nn

from vlmamba.models import VLMambaConfig, VLMambaForConditionalGeneration
from vlmamba.models.language import mamba_config

OURS, THEIRS, LINEAR = "vlmamba", "transformers LLaVA", "transformers LLaVA, loop made linear"
TOLERANCE = 2e-4
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """Sizes of a model and its batch.

    Attributes:
        text: (width, layers, vocabulary) of the language model.
        vision: (width, MLP width, blocks, heads, image size, patch size) of the tower.
        lengths: Text tokens of each row, besides its image.
    """

    text: tuple[int, int, int]
    vision: tuple[int, int, int, int, int, int]
    lengths: tuple[int, ...]


MINI_TOWER = (128, 512, 5, 4, 64, 8)
SIZES = {
    # 64 visual tokens; the playground's conversations have 71, 89 and 108 text tokens at the quartiles, an eighth of
    # them supervised
    "playground": Size(
        (128, 4, 600), MINI_TOWER, (44, 52, 60, 66, 71, 74, 78, 83, 89, 92, 97, 102, 108, 118, 131, 150)
    ),
    "130m": Size((768, 24, 50280), MINI_TOWER, (50, 64)),
    "tiny": Size((32, 2, 96), (32, 48, 2, 2, 16, 8), (3, 6, 9)),
}


def main(argv: list[str] | None = None) -> int:
    """Run the sizes asked for."""
    parser = arguments(__doc__ or "", "train_step")
    parser.add_argument("sizes", nargs="*", help=f"{', '.join(SIZES)}; playground and 130m by default")
    parser.add_argument("--rounds", type=int, help="rounds a size (7, or 2 with --quick)")
    parser.add_argument("--batch", type=int, help="rows, of a size's first lengths")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.sizes) - SIZES.keys())
    if unknown:
        parser.error(f"unknown size {unknown[0]!r}; there are {', '.join(SIZES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    record = environment(options.device, options.threads)
    cases = []
    try:
        for name in options.sizes or (["playground"] if options.quick else ["playground", "130m"]):
            cases.append(step_case(name, options))
    except DisagreementError as error:
        print(error, file=sys.stderr)
        return 1
    finish("train_step", options.out, cases, record)
    return 0


def step_case(name: str, options: Any) -> Case:
    """One size: compare, then time."""
    size, device = SIZES[name], options.device
    lengths = size.lengths[: options.batch or (4 if options.quick else len(size.lengths))]
    ours = our_model(size).to(device)
    theirs = their_model(ours).to(device)
    batch = {key: value.to(device) for key, value in make_batch(ours, lengths).items()}
    rows, length = batch["input_ids"].shape
    tokens = int(batch["attention_mask"].sum())
    title = f"stage-2 step, {name}, {rows} rows of up to {length} tokens ({tokens} without padding), fp32"
    error = compare(title, ours, theirs, batch)
    runs: dict[str, Callable[[], Any]] = {OURS: stepper(ours, batch), LINEAR: linear(stepper(theirs, batch))}
    runs[THEIRS] = stepper(theirs, batch)
    rounds = options.rounds or (2 if options.quick else 7)
    timings = alternate(runs, rounds=rounds, device=device, budget=10.0 if options.quick else 45.0)
    case = Case(title, OURS, timings, "tokens", float(tokens), {THEIRS: error, LINEAR: error})
    case.notes.append(
        f"The backward of '{THEIRS}' is quadratic in the length (it indexes the time axis at every step): its ratio "
        f"holds for {length} tokens only and grows with them. '{LINEAR}' takes the same loop apart once; compare with "
        "that."
    )
    return case


def our_model(size: Size) -> VLMambaForConditionalGeneration:
    """VLMamba with random weights, its tower frozen, in training mode."""
    width, mlp, blocks, heads, image, patch = size.vision
    hidden, layers, vocabulary = size.text
    text = mamba_config("130m", hidden_size=hidden, num_hidden_layers=layers, vocab_size=vocabulary)
    vision = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "image_size": image, "patch_size": patch,
    }  # fmt: skip
    config = VLMambaConfig(
        vision_config={"family": "siglip", "feature_layer": -2, "image_size": image, "config": vision},
        connector_config={"name": "mlp", "options": {}},
        text_config=text,
        image_token_id=vocabulary - 1,
    )
    torch.manual_seed(0)
    model = VLMambaForConditionalGeneration(config)
    model.vision_tower.requires_grad_(False)
    model.train()
    model.vision_tower.eval()
    return model


def their_model(ours: VLMambaForConditionalGeneration) -> Any:
    """LlavaForConditionalGeneration with a MambaConfig text model and our weights, tied as ours are.

    transformers' LLaVA reads `past_key_values` of its language model's output, which Mamba's has not: a hook adds it.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(**ours.config.vision_config["config"], vision_use_head=False)
    text = copy.deepcopy(ours.config.text_config)
    text.tie_word_embeddings = False  # the tie below; LLaVA looks for it under a transformer's names
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ours.config.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    theirs: Any = LlavaForConditionalGeneration(config)
    theirs.lm_head.weight = theirs.model.language_model.embeddings.weight
    own = theirs.state_dict()
    given = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    unknown = given.keys() - own.keys()
    left = {n for n in own.keys() - given.keys() if not n.startswith("model.vision_tower")}
    if unknown or left:
        raise DisagreementError(
            f"weights do not map: {sorted(unknown)[:3]} are ours alone, {sorted(left)[:3]} theirs."
        )
    theirs.load_state_dict(given, strict=False)
    theirs.model.vision_tower.requires_grad_(False)
    theirs.train()
    theirs.model.vision_tower.eval()

    def add_cache(module: nn.Module, args: Any, output: Any) -> Any:
        for name in ("past_key_values", "attentions"):
            if not hasattr(output, name):
                object.__setattr__(output, name, None)
        return output

    theirs.model.language_model.register_forward_hook(add_cache)
    return theirs


def their_name(name: str) -> str:
    """Our parameter's name in transformers' LLaVA."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.backbone.", "language_model.")
    if name.startswith("vision_tower."):
        name = "vision_tower." + name.removeprefix("vision_tower.").removeprefix("model.")
        return f"model.{name}"
    return f"model.{name}"


def make_batch(ours: VLMambaForConditionalGeneration, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Right-padded rows of an image and text; about an eighth of the text is supervised, each row's end always."""
    generator = torch.Generator().manual_seed(1)
    visual = ours.multi_modal_projector.num_tokens
    placeholder, width = ours.config.image_token_id, visual + max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        text = torch.randint(1, placeholder, (length,), generator=generator)
        end = visual + length
        ids[row, :end] = torch.cat([text[:1], torch.full((visual,), placeholder), text[1:]])
        answers = range(end - max(1, length // 8), end)
        labels[row, answers] = ids[row, answers]
        mask[row, :end] = 1
    tower = ours.vision_tower
    shape = (len(lengths), 3, tower.image_size, tower.image_size)
    pixels = torch.randn(shape, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over what trains."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)


def stepper(model: nn.Module, batch: dict[str, Tensor], optimizer: Any = None) -> Callable[[], Tensor]:
    """One whole step: forward, backward, clipping, update."""
    optimizer = optimizer or optimizer_of(model)
    weights = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@contextmanager
def linear_loop() -> Iterator[None]:
    """Let transformers' Mamba run a loop that is linear in the length."""
    from transformers.models.mamba import modeling_mamba

    original = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = linear_transformers_scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = original


def linear(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step with transformers' loop made linear."""

    def run() -> Tensor:
        with linear_loop():
            return step()

    return run


def compare(title: str, ours: nn.Module, theirs: nn.Module, batch: dict[str, Tensor]) -> float:
    """Hold loss, gradients and updated weights of both against each other; the largest error.

    The quadratic loop is compared on the batch's first row and the linear one on the whole batch. The weights are the
    same and slightly trained afterwards.
    """
    worst = 0.0
    first = {key: value[:1] for key, value in batch.items()}
    for some, context in ((first, None), (batch, linear_loop)):
        want = gradients(ours, some)
        if context is None:
            found = gradients(theirs, some)
        else:
            with context():
                found = gradients(theirs, some)
        renamed = {their_name(name) if name != "loss" else name: tensor for name, tensor in want.items()}
        worst = max(worst, check_same(title, THEIRS, found, renamed, TOLERANCE))
    stepper(ours, batch)()
    linear(stepper(theirs, batch))()
    updated = {their_name(n): p for n, p in ours.named_parameters() if p.requires_grad}
    # Adam's first step is the sign of a gradient where it is tiny: compare to the size of the weights.
    check_same(title, THEIRS, dict(theirs.named_parameters()), updated, 0.05)
    return worst


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach().reshape(1), **found}


if __name__ == "__main__":
    raise SystemExit(main())
