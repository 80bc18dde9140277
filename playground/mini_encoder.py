"""Pre-training of the playground's mini SigLIP encoder (called by ``build_mini.py``).

Three losses on endless scenes that are composed on the fly from the TRAINING digit samples, each digit bent
at random:

* the sigmoid image-text loss of SigLIP (Zhai et al. 2023, eq. 1) between the pooled picture and its
  caption, through a small text tower that is thrown away afterwards;
* caption grounding: the caption's words are known to belong to places, so every patch has to name the digit
  and the colour of the caption word that is drawn over it ("none" elsewhere).  This is denser supervision
  than SigLIP itself had; without it a few hundred thousand pictures are not enough for good patch features.
  It is read from ``feature_layer`` -2, the layer that LLaVA-style recipes use;
* finding the ink: after the second layer every patch has to tell which of its pixels are ink, whatever the
  colours. Without it the encoder stays blind to shapes for thousands of steps.

Shapes: B batch, L caption tokens, D model width, V patches (64), S picture side (64).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from phrases import caption
from PIL import Image
from scenes import COLOURS, SIDE, Scene, digit_pools, draw, sample_scene
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

logger = logging.getLogger(__name__)

IMAGE_SIZE = 64
PATCH = 8
GRID = IMAGE_SIZE // PATCH
NUM_VALUES = 10
CAPTION_TOKENS = 64
INK_LAYER = 2


@dataclass(frozen=True)
class EncoderTraining:
    """How the encoder is trained; ``steps`` times ``batch_size`` scenes, none seen twice."""

    steps: int = 5000
    batch_size: int = 64
    lr: float = 1.5e-3
    warmup: int = 300
    weight_decay: float = 0.05
    image_text_weight: float = 0.1
    ink_weight: float = 3.0
    seed: int = 0
    save_every: int = 500


def encoder_config() -> SiglipVisionConfig:
    """Five layers of width 128 over 8 x 8 patches: 1.2 M parameters, 64 visual tokens."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
    )


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """The digit value and the colour index over every patch, (V,) each; 10 and 8 stand for "none"."""
    centres = (np.arange(GRID) + 0.5) * (SIDE / GRID)
    values = np.full((GRID, GRID), NUM_VALUES, np.int64)
    colours = np.full((GRID, GRID), len(COLOURS), np.int64)
    names = list(COLOURS)
    for digit in scene.digits:
        near_x = np.abs(centres - digit.x) < 0.36 * digit.size
        near_y = np.abs(centres - digit.y) < 0.42 * digit.size
        covered = near_y[:, None] & near_x[None, :]
        values[covered] = digit.value
        colours[covered] = names.index(digit.colour)
    return values.ravel(), colours.ravel()


def to_pixels(picture: np.ndarray) -> np.ndarray:
    """A drawn picture at the encoder's size, (3, S, S) uint8, resized as image processors do (bicubic)."""
    small = Image.fromarray(picture).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)


def patch_ink(plane: np.ndarray) -> np.ndarray:
    """The ink of every pixel, (V, PATCH * PATCH) float16, from the picture's ink plane."""
    small = np.asarray(Image.fromarray(plane).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))
    blocks = small.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3)
    return blocks.reshape(GRID * GRID, PATCH * PATCH).astype(np.float16)


class SceneStream(IterableDataset):
    """Batches of fresh training scenes; batch ``i`` depends on (seed, i) alone, so runs may resume."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: EncoderTraining, start: int = 0) -> None:
        self.tokenizer, self.recipe, self.start = tokenizer, recipe, start
        self.pool, held_out = digit_pools()
        assert not set(self.pool) & set(held_out)
        self.allowed = frozenset(self.pool)

    def batch(self, index: int) -> dict[str, Tensor]:
        """The batch of one training step."""
        rng = np.random.default_rng([self.recipe.seed, index])
        pixels, inks, values, colours, texts = [], [], [], [], []
        for _ in range(self.recipe.batch_size):
            scene = sample_scene(rng, self.pool)
            assert all(digit.sample in self.allowed for digit in scene.digits), "a held-out digit was drawn"
            picture, plane = draw(scene, warp=rng)
            pixels.append(to_pixels(picture))
            inks.append(patch_ink(plane))
            patch_values, patch_colours = patch_labels(scene)
            values.append(patch_values)
            colours.append(patch_colours)
            texts.append(caption(scene, rng))
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=CAPTION_TOKENS)
        return {
            "pixels": torch.from_numpy(np.stack(pixels)),
            "ink": torch.from_numpy(np.stack(inks)),
            "values": torch.from_numpy(np.stack(values)),
            "colours": torch.from_numpy(np.stack(colours)),
            "ids": torch.tensor(tokens["input_ids"]),
            "mask": torch.tensor(tokens["attention_mask"]),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(self.start, self.recipe.steps):
            yield self.batch(index)


class EncoderWithHeads(nn.Module):
    """The encoder and what only its pre-training needs: text tower, grounding heads, scale and bias."""

    def __init__(self, vocab_size: int, feature_layer: int = -2) -> None:
        super().__init__()
        config = encoder_config()
        width = config.hidden_size
        config._attn_implementation = "eager"  # faster than SDPA's bf16 backward on CPUs, for 64 tokens
        self.vision = SiglipVisionModel(config)
        self.feature_layer = feature_layer
        self.patch_norm = nn.LayerNorm(width)
        self.patch_head = nn.Linear(width, NUM_VALUES + 1 + len(COLOURS) + 1)
        self.ink_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, PATCH * PATCH))
        self.words = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(CAPTION_TOKENS, width) * 0.02)
        self.text = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "relu", batch_first=True, norm_first=True
        )
        self.text_out = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Patch logits (B, V, 11 + 9), ink logits (B, V, 64), picture-caption logits (B, B)."""
        seen = self.vision(pixel_values=pixels, output_hidden_states=True)
        patches = self.patch_head(self.patch_norm(seen.hidden_states[self.feature_layer]))
        text = self.words(ids) + self.positions[: ids.shape[1]]
        text = self.text(text, src_key_padding_mask=mask == 0)
        weight = mask.to(text.dtype)[..., None]
        text = self.text_out((text * weight).sum(1) / weight.sum(1))
        image = F.normalize(seen.pooler_output.float(), dim=-1)
        similarity = image @ F.normalize(text.float(), dim=-1).T
        similarity = similarity * self.log_scale.float().exp() + self.bias.float()
        ink = self.ink_head(seen.hidden_states[INK_LAYER])
        return {"patches": patches.float(), "ink": ink.float(), "similarity": similarity}


def losses(seen: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Grounding (digit, colour), ink and image-text losses; patches without a digit count a fifth."""
    weight = torch.where(batch["values"] == NUM_VALUES, 0.2, 1.0).flatten()
    weight = weight / weight.sum()
    patches = seen["patches"].flatten(0, 1)
    values = F.cross_entropy(patches[:, : NUM_VALUES + 1], batch["values"].flatten(), reduction="none")
    colours = F.cross_entropy(patches[:, NUM_VALUES + 1 :], batch["colours"].flatten(), reduction="none")
    ink = F.binary_cross_entropy_with_logits(seen["ink"], batch["ink"].float())
    similarity = seen["similarity"]
    signs = 2.0 * torch.eye(len(similarity)) - 1.0  # SigLIP eq. 1: +1 on the diagonal, -1 elsewhere
    image_text = -F.logsigmoid(signs * similarity).sum() / len(similarity)
    return {
        "digit": (values * weight).sum(),
        "colour": (colours * weight).sum(),
        "ink": ink,
        "image_text": image_text,
    }


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to -1..1, SigLIP's own normalisation."""
    return pixels.float() / 127.5 - 1.0


def learning_rate(step: int, recipe: EncoderTraining) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.lr * 0.5 * (1.0 + float(np.cos(np.pi * progress)))


def train_encoder(
    tokenizer: PreTrainedTokenizerFast, recipe: EncoderTraining, work: Path
) -> SiglipVisionModel:
    """Pre-train the encoder; resumes from ``work/encoder.pt`` where there is one.

    Parameters are kept in float32 and computed with in bfloat16.
    """
    torch.manual_seed(recipe.seed)
    model = EncoderWithHeads(len(tokenizer))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    state_file, start, spent = work / "encoder.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent = state["step"], state["seconds"]
    loader = DataLoader(
        SceneStream(tokenizer, recipe, start), batch_size=None, num_workers=1, prefetch_factor=8
    )
    mean: dict[str, float] = {}
    began = time.monotonic() - spent
    progress = tqdm(loader, initial=start, total=recipe.steps, desc="encoder", mininterval=5)
    for step, batch in enumerate(progress, start=start):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        half = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
        inputs = (normalise(batch["pixels"]).to(torch.bfloat16), batch["ids"], batch["mask"])
        terms = losses(torch.func.functional_call(model, half, inputs), batch)
        loss = terms["digit"] + 0.5 * terms["colour"] + recipe.ink_weight * terms["ink"]
        loss = loss + recipe.image_text_weight * terms["image_text"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, term in terms.items():
            mean[name] = 0.98 * mean.get(name, float(term)) + 0.02 * float(term)
        progress.set_postfix({name: f"{value:.3f}" for name, value in mean.items()}, refresh=False)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "seconds": time.monotonic() - began}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    logger.info("encoder: %d steps, %.0f s", recipe.steps, time.monotonic() - began)
    return model.vision
