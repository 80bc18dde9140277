"""Cobra's (prismatic) checkpoints <-> our model.

Source: github.com/h-zhao1997/cobra: cobra/models/vlms/cobra.py (`from_pretrained`), cobra/util/nn_utils.py
(`FusedMLPProjector`: Linears 0, 2, 4 of a Sequential, the first four times as wide as the fused features;
`MLPProjector`: 0, 2; `LinearProjector`: one Linear), cobra/training/strategies/*.py (`save_checkpoint`). A
file holds ``{"model": {"projector": {...}, "llm_backbone": {...}}}``, and the run's directory `config.json`
and `checkpoints/latest-checkpoint.pt`. The encoders are frozen there and are not in it. The language model
inside has the original state-spaces/mamba names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vlmamba.checkpoints.keymap import KeyMap, Rule, add_prefix
from vlmamba.checkpoints.state_spaces import STATE_SPACES
from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.language.weights import load_weights_only

CHECKPOINT = Path("checkpoints") / "latest-checkpoint.pt"
CONNECTOR = "multi_modal_projector."
LANGUAGE = "language_model."

PRISMATIC = KeyMap(
    "Cobra's prismatic layout",
    (
        *(
            Rule(f"projector.projector.{2 * k}.{{rest}}", f"{CONNECTOR}linear_{k + 1}.{{rest}}")
            for k in range(3)
        ),
        *(Rule(f"llm_backbone.llm.{rule.theirs}", LANGUAGE + rule.ours) for rule in STATE_SPACES.rules),
    ),
)
PRISMATIC_LINEAR = KeyMap(
    "Cobra's prismatic layout (linear projector)",
    (Rule("projector.projector.{rest}", CONNECTOR + "linear_1.{rest}"), *PRISMATIC.rules[3:]),
)


def is_prismatic(content: object) -> bool:
    """Whether the content of a file is a prismatic checkpoint."""
    parts = content.get("model") if isinstance(content, Mapping) else None
    return isinstance(parts, Mapping) and "projector" in parts


def load_prismatic(path: str | Path) -> dict[str, torch.Tensor]:
    """Our state dict of a Cobra checkpoint: connector and language model, without the encoders.

    Args:
        path: The `.pt` file, or a run's directory.

    Returns:
        `multi_modal_projector.*` and, unless it is a checkpoint of the alignment stage, `language_model.*`.

    Raises:
        MissingFileError: No such file.
        CheckpointError: It is damaged, is not weights-only, or is of another layout.
    """
    file = Path(path)
    if file.is_dir():
        file = file / CHECKPOINT
    if not file.is_file():
        raise MissingFileError(
            f"{file}: no such file; a Cobra run's directory holds {CHECKPOINT} and config.json"
        )
    content = load_weights_only(file)
    if not is_prismatic(content):
        names = list(content)[:8] if isinstance(content, Mapping) else [type(content).__name__]
        raise CheckpointError(
            f"{file}: not a prismatic (Cobra) checkpoint: looked for 'model' with 'projector' and "
            f"'llm_backbone' in it, found {', '.join(map(str, names))}"
        )
    assert isinstance(content, Mapping)
    return model_from_prismatic(content["model"], where=str(file))


def model_from_prismatic(
    parts: Mapping[str, Mapping[str, torch.Tensor]], *, where: str = "checkpoint"
) -> dict[str, torch.Tensor]:
    """As `load_prismatic`, from the dictionary under "model".

    Raises:
        CheckpointError: It holds parts or names that are not known.
    """
    other = sorted(parts.keys() - {"projector", "llm_backbone"})
    if other:
        raise CheckpointError(
            f"{where}: holds {', '.join(other)} beside projector and llm_backbone. Trained encoders are not "
            "converted: Cobra's are frozen; remove that part to use the original ones."
        )
    flat: dict[str, torch.Tensor] = {}
    for part, state in parts.items():
        flat.update(add_prefix(state, f"{part}."))
    return _map_for(flat, "projector.projector.weight").to_ours(flat, where=where)


def model_to_prismatic(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The dictionary under "model" for connector and language model of ours.

    Raises:
        CheckpointError: The connector is of a kind that Cobra does not have.
    """
    single = CONNECTOR + "linear_2.weight" not in state and CONNECTOR + "linear_1.weight" in state
    flat = (PRISMATIC_LINEAR if single else PRISMATIC).to_theirs(state, where="model")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in flat.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _map_for(flat: Mapping[str, torch.Tensor], single: str) -> KeyMap:
    return PRISMATIC_LINEAR if single in flat else PRISMATIC
