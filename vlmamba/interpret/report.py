"""What ``vlmamba inspect`` writes: overlay PNGs, the raw maps, and one page with all of it.

Shapes: n images, H W patches, K answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmamba.common.files import replace_json, replaced
from vlmamba.common.images import image_size
from vlmamba.interpret.answers import Answer
from vlmamba.interpret.methods import check_method, explain, methods_of
from vlmamba.interpret.overlay import overlay, patch_grid, png
from vlmamba.models.modeling import VLMambaForConditionalGeneration
from vlmamba.models.processing import VLMambaProcessor
from vlmamba.pages import data_address, write_page

TOP = 5
"""Patches in the table of the strongest."""

NOTES = {
    "hidden-attention": "the Mamba layers' hidden attention, all layers and channels composed; positive part",
    "gradient": "integrated gradients of the token's log probability from a blank image; positive part",
    "gradient-x-input": "gradient times patch features at the picture itself; positive part",
    "cross-attention": "Q-Mamba's cross-attention, queries weighted by what they add to the token",
}


@dataclass(frozen=True)
class Map:
    """One map of one answer token.

    Attributes:
        token: Index of the answer token.
        method: Name of the method ("hidden-attention" with a layer reads "hidden-attention layer 3").
        image: Index of the picture.
        values: (H, W), signed.
    """

    token: int
    method: str
    image: int
    values: np.ndarray

    @property
    def name(self) -> str:
        """Name of its PNG."""
        return f"token{self.token}-{self.method.replace(' ', '-')}-image{self.image}.png"

    def top(self, count: int = TOP) -> list[tuple[int, int, float]]:
        """Row, column and share of the positive mass of the strongest patches."""
        mass = np.clip(self.values, 0, None)
        share = mass / max(float(mass.sum()), 1e-12)
        best = np.argsort(-share, axis=None, kind="stable")[:count]
        rows, columns = np.unravel_index(best, share.shape)
        return [(int(r), int(c), float(share[r, c])) for r, c in zip(rows, columns, strict=True)]


def make_maps(
    model: VLMambaForConditionalGeneration,
    answer: Answer,
    *,
    tokens: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    layers: Sequence[int] = (),
) -> list[Map]:
    """All maps asked for.

    Args:
        model: The model.
        answer: What it answered.
        tokens: Answer tokens; all when left out.
        methods: Names of methods; all that the model allows when left out.
        layers: Layers whose hidden attention is drawn by itself, instead of all composed.

    Raises:
        ConfigError: A method, token or layer does not fit.
    """
    names = methods_of(model) if methods is None else list(methods)
    for layer in layers:
        check_method(model, "hidden-attention", layer=layer)
    plan: list[tuple[str, int | None]] = []
    for name in names:
        own: list[int | None] = [*layers] if name == "hidden-attention" else []
        plan += [(name, layer) for layer in own or [None]]
    grid = model.vision_tower.grid
    found = []
    for token in range(len(answer.tokens)) if tokens is None else tokens:
        for name, chosen in plan:
            values = explain(model, answer, token, name, layer=chosen).numpy()
            label = name if chosen is None else f"{name} layer {chosen}"
            found += [Map(token, label, image, flat.reshape(grid)) for image, flat in enumerate(values)]
    return found


def write_inspection(
    folder: str | Path,
    answer: Answer,
    maps: Sequence[Map],
    processor: VLMambaProcessor,
    *,
    checkpoint: str = "",
) -> Path:
    """Write the overlays, ``maps.json`` and ``index.html``.

    Returns:
        The page.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    images = processor.image_processor
    tokens: dict[int, dict[str, Any]] = {}
    for one in maps:
        picture = answer.images[one.image]
        data = png(overlay(picture, one.values, images))
        with replaced(target / one.name) as unfinished:
            unfinished.write_bytes(data)
        size = image_size(picture, exif_transpose=images.exif_transpose)
        places = patch_grid(images, size, one.values.shape)
        row = tokens.setdefault(
            one.token,
            {
                "index": one.token,
                "text": answer.tokens[one.token],
                "probability": f"{float(np.exp(answer.log_probs[one.token])):.3f}",
                "maps": [],
            },
        )
        row["maps"].append(
            {
                "method": one.method,
                "note": NOTES.get(one.method, "norm of what each visual token adds to this layer's output"),
                "image": one.image,
                "name": one.name,
                "data": data_address(data, "image/png"),
                "top": [
                    {"row": r, "column": c, "share": f"{100 * share:.1f} %", "box": places.box(r, c, size)}
                    for r, c, share in one.top()
                ],
            }
        )
    replace_json(target / "maps.json", _raw(answer, maps, checkpoint), indent=None)
    return write_page(
        target / "index.html",
        "inspect.html",
        title=answer.question,
        answer=answer,
        tokens=list(tokens.values()),
        checkpoint=checkpoint,
        several=len(answer.images) > 1,
    )


def _raw(answer: Answer, maps: Sequence[Map], checkpoint: str) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint,
        "question": answer.question,
        "answer": answer.text,
        "tokens": list(answer.tokens),
        "log_probs": list(answer.log_probs),
        "maps": [
            {"token": m.token, "method": m.method, "image": m.image, "values": m.values.tolist()}
            for m in maps
        ],
    }
