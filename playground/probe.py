"""Probe the mini encoder: what can be read from its frozen patch features, on held-out digits?

    python playground/probe.py --data playground/data/mini

Fits two small readers on features of training scenes (drawn afresh from the training samples) and scores
them on the held-out pictures of the data set, as they lie on disk: a linear one on the mean of a cell's
patches, and an MLP on all patches of a cell.  Each names the digit (or "none") and the colour in every
cell; the count follows from the cells that are not empty.  Reported per feature layer (-1 is the last, -2
what LLaVA-style recipes use).  The language model is asked about scenes that it reads about (notes, or a
caption), and that it does not.

Shapes: B pictures, V patches (64), D encoder width.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mini_encoder import GRID, NUM_VALUES, normalise, to_pixels
from phrases import caption, dialogue
from scenes import COLOURS, Scene, digit_pools, render, sample_scene
from torch import Tensor, nn
from transformers import SiglipVisionModel

from vlmamba.common.images import open_image

Labels = tuple[Tensor, Tensor]


def cell_labels(digits: list[tuple[int, int, str]]) -> tuple[list[int], list[int]]:
    """Value and colour per cell from (cell, value, colour) triples; 10 and 8 stand for an empty cell."""
    values, colours = [NUM_VALUES] * 4, [len(COLOURS)] * 4
    for cell, value, colour in digits:
        values[cell], colours[cell] = value, list(COLOURS).index(colour)
    return values, colours


def _cells(scene: Scene) -> tuple[list[int], list[int]]:
    return cell_labels([(d.cell, d.value, d.colour) for d in scene.digits])


@torch.no_grad()
def features(encoder: SiglipVisionModel, pixels: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """Patch features by layer, (B, 4 cells, 16 patches, D)."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for chunk in pixels.split(128):
        states = encoder(pixel_values=normalise(chunk), output_hidden_states=True).hidden_states
        for layer in layers:
            grid = states[layer].unflatten(1, (2, GRID // 2, 2, GRID // 2))  # B, row, y, column, x, D
            parts[layer].append(grid.transpose(2, 3).flatten(3, 4).flatten(1, 2))
    return {layer: torch.cat(chunks) for layer, chunks in parts.items()}


def fit(inputs: Tensor, labels: Tensor, hidden: int, steps: int = 800) -> nn.Module:
    """A reader from (n, D) to classes: linear for ``hidden`` 0, else an MLP."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(inputs.shape[1], affine=False)
    classes = int(labels.max()) + 1
    layers = [nn.Linear(inputs.shape[1], hidden or classes)]
    if hidden:
        layers += [nn.GELU(), nn.Linear(hidden, classes)]
    reader = nn.Sequential(norm, *layers)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (512,))
        loss = F.cross_entropy(reader(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


@torch.no_grad()
def score(readers: tuple[nn.Module, nn.Module], inputs: Tensor, labels: Labels) -> dict[str, float]:
    """Accuracy of digits and colours over cells that hold a digit, and of the count over pictures."""
    values, colours = (reader(inputs).argmax(-1) for reader in readers)
    full = labels[0] != NUM_VALUES
    counted = (values != NUM_VALUES).view(-1, 4).sum(1) == full.view(-1, 4).sum(1)
    return {
        "digit": (values == labels[0])[full].float().mean().item(),
        "colour": (colours == labels[1])[full].float().mean().item(),
        "count": counted.float().mean().item(),
    }


@torch.no_grad()
def reading(path: Path, scenes: int = 300) -> dict[str, dict[str, float]]:
    """Share of right answers of the language model for each kind of question: {way: {category: share}}.

    It is told about the scene by loose notes (what a connector will give it), by a written caption, or not at all.
    """
    from mini_language import BALANCED, END, WORDS, embed, notes
    from transformers import AutoTokenizer

    from vlmamba.models.language import MambaLM

    model = MambaLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    rng = np.random.default_rng(2)
    pool, _ = digit_pools()
    hits: dict[str, dict[str, list[bool]]] = {"notes": {}, "caption": {}, "blind": {}}
    for _ in range(scenes):
        scene = sample_scene(rng, pool)
        for question in dialogue(scene, rng, 4, BALANCED):
            answer = tokenizer(f" {question.answer}{END}").input_ids
            for way, told, written in (
                ("notes", notes(scene, rng), ""),
                ("caption", [], caption(scene, rng) + "\n"),
                ("blind", [], ""),
            ):
                positions = [tokenizer(words).input_ids[:WORDS] if words else [] for words in told]
                prompt = tokenizer(f"USER: {written}{question.text} ASSISTANT:").input_ids
                positions += [[word] for word in prompt + answer]
                ids = torch.tensor([words + [-1] * (WORDS - len(words)) for words in positions])
                logits = model(inputs_embeds=embed(model, ids[None])).logits[0, -len(answer) - 1 : -1]
                hits[way].setdefault(question.category, []).append(logits.argmax(-1).tolist() == answer)
    return {
        way: {name: sum(right) / len(right) for name, right in sorted(kinds.items())}
        for way, kinds in hits.items()
    }


def main() -> None:
    """Command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, default=here / "mini" / "siglip")
    parser.add_argument("--data", type=Path, default=here / "data" / "mini")
    parser.add_argument("--train-scenes", type=int, default=3000)
    parser.add_argument("--layers", type=int, nargs="+", default=[-1, -2, -3])
    parser.add_argument("--language", type=Path, default=here / "mini" / "mamba")
    arguments = parser.parse_args()
    for way, kinds in reading(arguments.language).items():
        print(f"language model {way:8s}", *(f"{key} {value:.3f}" for key, value in kinds.items()), flush=True)
    encoder = SiglipVisionModel.from_pretrained(arguments.encoder).eval()
    rng = np.random.default_rng(1)
    pool, _ = digit_pools()
    scenes = [sample_scene(rng, pool) for _ in range(arguments.train_scenes)]
    train_pixels = torch.from_numpy(np.stack([to_pixels(render(scene)) for scene in scenes]))
    train_cells = [_cells(scene) for scene in scenes]
    truth = json.loads((arguments.data / "heldout/scenes.json").read_text(encoding="utf-8"))
    pictures = [np.asarray(open_image(arguments.data / "heldout/images" / name)) for name in truth]
    test_pixels = torch.from_numpy(np.stack([to_pixels(picture) for picture in pictures]))
    test_cells = [
        cell_labels([(d["cell"], d["value"], d["colour"]) for d in scene["digits"]])
        for scene in truth.values()
    ]
    train_labels, test_labels = (
        tuple(torch.tensor([c[i] for c in cells]).flatten() for i in (0, 1))
        for cells in (train_cells, test_cells)
    )
    train = features(encoder, train_pixels, arguments.layers)
    test = features(encoder, test_pixels, arguments.layers)
    for layer in arguments.layers:
        for name, hidden in (("linear", 0), ("mlp", 256)):
            pick = (
                (lambda x: x.mean(2).flatten(0, 1))
                if name == "linear"
                else (lambda x: x.flatten(2).flatten(0, 1))
            )
            inputs = pick(train[layer])
            readers = (fit(inputs, train_labels[0], hidden), fit(inputs, train_labels[1], hidden))
            result = score(readers, pick(test[layer]), test_labels)
            print(f"layer {layer} {name:6s}", *(f"{key} {value:.3f}" for key, value in result.items()))


if __name__ == "__main__":
    main()
