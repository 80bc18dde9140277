"""Do the maps of ``vlmamba inspect`` lie on the digit that was asked for? Measured on the held-out questions.

    python playground/inspect_heldout.py runs/quickstart/finetune runs/mlp/finetune --output inspect_heldout.json

For held-out questions about one place or one digit of a picture, the share of a map's positive mass that lies on the
asked cell of the 2 x 2 layout, and how often the strongest patch does. Beside it chance (the cell's share of the
picture, 0.25), any cell with ink ("a digit": what a mere salience map would get), and a control: the map of a question
about another digit of the same picture. Pictures with one digit are left out, since there every map that finds ink
would be right.

Shapes: H W patches.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from phrases import TEMPLATES
from scenes import PLACES
from torch import Tensor

from vlmamba.common.images import open_image
from vlmamba.common.load import load_model
from vlmamba.interpret.answers import answer_question
from vlmamba.interpret.methods import explain, methods_of

KINDS = ("digit_at", "colour_at", "place_of_value", "place_of_colour")


def asked_cell(question: dict[str, Any], digits: list[dict[str, Any]]) -> int:
    """The cell a question is about: the one it names, or that of the only digit it fits."""
    slots = question["slots"]
    if "place" in slots:
        return PLACES.index(slots["place"])
    (cell,) = [d["cell"] for d in digits if all(str(d[name]) == value for name, value in slots.items())]
    return int(cell)


def cell_mask(cell: int, height: int, width: int) -> Tensor:
    """The patches of a cell, (H, W)."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    row, column = cell // 2 * height // 2, cell % 2 * width // 2
    mask[row : row + height // 2, column : column + width // 2] = True
    return mask


def about_another(question: dict[str, Any], digits: list[dict[str, Any]], cell: int) -> str:
    """The same kind of question about another digit of the picture."""
    other = next(d for d in digits if d["cell"] != cell)
    slots = {name: str(other[name]) for name in question["slots"] if name != "place"}
    slots |= {"place": PLACES[other["cell"]]} if "place" in question["slots"] else {}
    text = TEMPLATES[question["kind"]][0].format(**slots)
    _, newline, instruction = question["text"].partition("\n")
    return text + newline + instruction


def measure(
    checkpoint: str, rows: list[dict[str, Any]], scenes: dict[str, Any], images: Path
) -> dict[str, Any]:
    """Averages of one checkpoint by kind of question and method."""
    model, processor = load_model(checkpoint, dtype="float32")
    height, width = model.vision_tower.grid
    found: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        digits = scenes[row["image"]]["digits"]
        cell = asked_cell(row, digits)
        mask = cell_mask(cell, height, width)
        ink = torch.stack([cell_mask(d["cell"], height, width) for d in digits]).any(0)
        picture = open_image(images / row["image"])
        answer, other = (
            answer_question(model, processor, [picture], text)
            for text in (row["text"], about_another(row, digits, cell))
        )
        right[row["kind"]].append(answer.text == row["answer"])
        for method in methods_of(model):
            maps = [explain(model, a, 0, method).clamp(min=0).view(height, width) for a in (answer, other)]
            mass, elsewhere = (m / m.sum().clamp(min=1e-12) for m in maps)
            found[row["kind"], method].append(
                [
                    float(mass[mask].sum()),
                    float(mask.flatten()[mass.argmax()]),
                    float(mass[ink].sum()),
                    float(elsewhere[mask].sum()),
                ]
            )
    names = ("share", "hit", "digit", "other_question")
    results = {
        f"{kind} {method}": dict(zip(names, torch.tensor(values).mean(0).tolist(), strict=True))
        | {"questions": len(values), "accuracy": sum(right[kind]) / len(right[kind])}
        for (kind, method), values in found.items()
    }
    return {"connector": model.multi_modal_projector.name, "results": results}


def main() -> None:
    """Command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", type=Path, default=here / "data" / "mini" / "heldout")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--limit", type=int, help="questions of a kind; all when left out")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    lines = (arguments.data / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    scenes = json.loads((arguments.data / "scenes.json").read_text(encoding="utf-8"))
    questions = [row for row in map(json.loads, lines) if row.get("kind") in arguments.kinds]
    several = [row for row in questions if len(scenes[row["image"]]["digits"]) > 1]
    chosen = [
        row
        for kind in arguments.kinds
        for row in [r for r in several if r["kind"] == kind][: arguments.limit]
    ]
    report = []
    print(
        "| checkpoint | question | method | mass on the cell | strongest patch on it | on a digit | other question |"
    )
    print("|---|---|---|---|---|---|---|")
    for checkpoint in arguments.checkpoints:
        measured = measure(checkpoint, chosen, scenes, arguments.data / "images")
        report.append({"checkpoint": checkpoint, "chance": 0.25, **measured})
        for name, row in measured["results"].items():
            kind, method = name.split()
            cells = (f"{row[key]:.3f}" for key in ("share", "hit", "digit", "other_question"))
            print("|", " | ".join([measured["connector"], kind, method, *cells]), "|", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
