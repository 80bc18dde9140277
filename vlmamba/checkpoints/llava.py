"""LLaVA's `mm_projector.bin` <-> the connector "mlp".

Source: `build_vision_projector` in llava/model/multimodal_projector/builder.py: "linear" is one Linear,
    "mlp{n}x_gelu"
a Sequential with a GELU between its Linears, so that Linear number k has index 2 (k - 1). Files saved by a
stage-1 run hold `model.mm_projector.*`; those of a LoRA run (`non_lora_trainables.bin`) have
`base_model.model.` in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vlmamba.checkpoints.keymap import KeyMap, Rule
from vlmamba.errors import CheckpointError
from vlmamba.models.language.weights import load_state_dict_file

MAX_DEPTH = 4
PROJECTOR = "mm_projector."
PREFIX = "model.mm_projector."

LLAVA_MLP = KeyMap(
    "LLaVA's mm_projector (mlp2x_gelu and deeper)",
    tuple(Rule(f"{PREFIX}{2 * k}.{{rest}}", f"linear_{k + 1}.{{rest}}") for k in range(MAX_DEPTH)),
)
LLAVA_LINEAR = KeyMap("LLaVA's mm_projector (linear)", (Rule(f"{PREFIX}{{rest}}", "linear_1.{rest}"),))


def load_mm_projector(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a connector "mlp" from a LLaVA projector file.

    Args:
        path: `mm_projector.bin`, or `non_lora_trainables.bin` of a LoRA run.

    Returns:
        `linear_1.weight`, `linear_1.bias`, ...: the connector's own names.

    Raises:
        MissingFileError: No such file.
        CheckpointError: It is damaged, is not weights-only, or holds no projector.
    """
    return connector_from_llava(load_state_dict_file(path), where=str(path))


def connector_from_llava(
    state: Mapping[str, torch.Tensor], *, where: str = "checkpoint"
) -> dict[str, torch.Tensor]:
    """As `load_mm_projector`, from a state dict.

    Raises:
        CheckpointError: There is no projector in it, or one of a kind the connector "mlp" is not.
    """
    projector = {
        PREFIX + name.split(PROJECTOR, 1)[1]: tensor for name, tensor in state.items() if PROJECTOR in name
    }
    if not projector:
        raise CheckpointError(
            f"{where}: no LLaVA projector in it: looked for names with {PROJECTOR!r}, found "
            f"{', '.join(list(state)[:8]) or 'nothing'}"
        )
    linear = {f"{PREFIX}weight", f"{PREFIX}bias"}
    return (LLAVA_LINEAR if projector.keys() <= linear else LLAVA_MLP).to_ours(projector, where=where)


def connector_to_llava(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The content of an `mm_projector.bin` for a connector "mlp".

    Raises:
        CheckpointError: The connector is of another kind.
    """
    depth = len({name.split(".")[0] for name in state})
    return (LLAVA_LINEAR if depth == 1 else LLAVA_MLP).to_theirs(state, where="connector")
