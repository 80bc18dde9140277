"""Names of weights in other projects <-> ours, as declarative two-way maps.

A rule is a pair such as ``("llm.layers.{i}.{rest}", "layers.{i}.{rest}")``: theirs and ours; the fields in braces carry
over. ``{i}`` (any name of one letter) stands for a number, every other name for a part of a name that is not empty. The
first rule that matches wins. The same rules read from right to left give the way back, so a round trip is the identity.

Sources:
- state-spaces/mamba, mamba_ssm/models/mixer_seq_simple.py, `MixerModel` and `MambaLMHeadModel`: they differ from
  transformers (whose names are `MambaLM`'s) in the embedding only.
- LLaVA, llava/model/multimodal_projector/builder.py, `build_vision_projector`: "linear" is one Linear, "mlp{n}x_gelu" a
  Sequential with a GELU between its Linears, so that Linear number k has index 2 (k - 1). Files saved by a stage-1 run
  hold ``model.mm_projector.*``; those of a LoRA run (``non_lora_trainables.bin``) have ``base_model.model.`` in front.
- Cobra (prismatic), github.com/h-zhao1997/cobra: cobra/util/nn_utils.py (`FusedMLPProjector`: Linears 0, 2, 4 of a
  Sequential; `MLPProjector`: 0, 2; `LinearProjector`: one), cobra/training/strategies/*.py (`save_checkpoint`): a file
  holds ``{"model": {"projector": {...}, "llm_backbone": {...}}}``. The encoders are frozen there and are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from vlmamba.errors import CheckpointError

Value = TypeVar("Value")
Tensors = dict[str, torch.Tensor]
_FIELD = re.compile(r"\{(\w+)\}")
_LISTED = 8


@dataclass(frozen=True)
class KeyMap:
    """Rules from another project's names to ours and back.

    Attributes:
        name: What is mapped, for messages.
        rules: Pairs of patterns, theirs and ours, which have the same fields; tried in order.
    """

    name: str
    rules: Sequence[tuple[str, str]]

    def __post_init__(self) -> None:
        for theirs, ours in self.rules:
            if sorted(_FIELD.findall(theirs)) != sorted(set(_FIELD.findall(ours))):
                raise ValueError(f"rule {theirs!r} <-> {ours!r}: both sides must have the same fields, once")

    def to_ours(self, state: Mapping[str, Value], *, where: str = "checkpoint") -> dict[str, Value]:
        """Rename their names to ours.

        Args:
            state: Their names to anything (tensors, shapes, ...).
            where: What is renamed, for messages.

        Raises:
            CheckpointError: A name that no rule matches, or two that become one.
        """
        return self._rename(state, list(self.rules), where)

    def to_theirs(self, state: Mapping[str, Value], *, where: str = "checkpoint") -> dict[str, Value]:
        """Rename our names to theirs; the reverse of `to_ours`."""
        return self._rename(state, [(ours, theirs) for theirs, ours in self.rules], where)

    def _rename(
        self, state: Mapping[str, Value], rules: Sequence[tuple[str, str]], where: str
    ) -> dict[str, Value]:
        patterns = [(_pattern(before), after) for before, after in rules]
        renamed: dict[str, Value] = {}
        source: dict[str, str] = {}
        unknown = []
        for name, value in state.items():
            matches = ((pattern.fullmatch(name), after) for pattern, after in patterns)
            new = next((after.format(**match.groupdict()) for match, after in matches if match), None)
            if new is None:
                unknown.append(name)
            elif new in renamed:
                raise CheckpointError(f"{where}: {source[new]} and {name} both become {new} ({self.name})")
            else:
                renamed[new], source[new] = value, name
        if unknown:
            more = f", and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
            raise CheckpointError(
                f"{where}: {len(unknown)} names are not known in {self.name}: {', '.join(unknown[:_LISTED])}{more}. "
                f"Known are: {', '.join(before for before, _ in rules)}."
            )
        return renamed


def _pattern(text: str) -> re.Pattern[str]:
    out = [
        f"(?P<{part}>{'[0-9]+' if len(part) == 1 else '.+'})" if index % 2 else re.escape(part)
        for index, part in enumerate(_FIELD.split(text))
    ]
    return re.compile("".join(out))


def part_of(state: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """The names that start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


CONNECTOR, LANGUAGE = "multi_modal_projector.", "language_model."
PROJECTOR = "mm_projector."
_LLAVA = f"model.{PROJECTOR}"
_SAME = ("layers.{i}.norm.{rest}", "layers.{i}.mixer.{rest}", "norm_f.{rest}")

STATE_SPACES = KeyMap(
    "the original state-spaces/mamba layout",
    [
        ("backbone.embedding.{rest}", "backbone.embeddings.{rest}"),
        *((f"backbone.{name}", f"backbone.{name}") for name in _SAME),
        ("lm_head.{rest}", "lm_head.{rest}"),
    ],
)
LLAVA_MLP = KeyMap(
    "LLaVA's mm_projector (mlp2x_gelu and deeper)",
    [(f"{_LLAVA}{2 * k}.{{rest}}", f"linear_{k + 1}.{{rest}}") for k in range(4)],
)
LLAVA_LINEAR = KeyMap("LLaVA's mm_projector (linear)", [(f"{_LLAVA}{{rest}}", "linear_1.{rest}")])
_LLM = [(f"llm_backbone.llm.{theirs}", LANGUAGE + ours) for theirs, ours in STATE_SPACES.rules]
PRISMATIC = KeyMap(
    "Cobra's prismatic layout",
    [
        *((f"projector.projector.{2 * k}.{{rest}}", f"{CONNECTOR}linear_{k + 1}.{{rest}}") for k in range(3)),
        *_LLM,
    ],
)
PRISMATIC_LINEAR = KeyMap(
    "Cobra's prismatic layout (linear projector)",
    [("projector.projector.{rest}", CONNECTOR + "linear_1.{rest}"), *_LLM],
)


def connector_from_llava(state: Mapping[str, torch.Tensor], *, where: str = "checkpoint") -> Tensors:
    """The state dict of a connector "mlp" (`linear_1.weight`, ...) from the content of an `mm_projector.bin`.

    Raises:
        CheckpointError: It is one of a kind that the connector "mlp" is not.
    """
    projector = {
        _LLAVA + name.split(PROJECTOR, 1)[1]: tensor for name, tensor in state.items() if PROJECTOR in name
    }
    linear = {f"{_LLAVA}weight", f"{_LLAVA}bias"}
    return (LLAVA_LINEAR if projector.keys() <= linear else LLAVA_MLP).to_ours(projector, where=where)


def connector_to_llava(state: Mapping[str, torch.Tensor]) -> Tensors:
    """The content of an `mm_projector.bin` for a connector "mlp".

    Raises:
        CheckpointError: The connector is of another kind.
    """
    depth = len({name.split(".")[0] for name in state})
    return (LLAVA_LINEAR if depth == 1 else LLAVA_MLP).to_theirs(state, where="connector")


def model_from_prismatic(
    parts: Mapping[str, Mapping[str, torch.Tensor]], *, where: str = "checkpoint"
) -> Tensors:
    """Connector and, but in the alignment stage, language model of ours from the dictionary under "model".

    Raises:
        CheckpointError: It holds parts or names that are not known.
    """
    other = sorted(parts.keys() - {"projector", "llm_backbone"})
    if other:
        raise CheckpointError(
            f"{where}: holds {', '.join(other)} beside projector and llm_backbone. Trained encoders are not "
            "converted: Cobra's are frozen; remove that part to use the original ones."
        )
    flat = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    single = "projector.projector.weight" in flat
    return (PRISMATIC_LINEAR if single else PRISMATIC).to_ours(flat, where=where)


def model_to_prismatic(state: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """The dictionary under "model" for connector and language model of ours.

    Raises:
        CheckpointError: The connector is of a kind that Cobra does not have.
    """
    single = CONNECTOR + "linear_2.weight" not in state and CONNECTOR + "linear_1.weight" in state
    flat = (PRISMATIC_LINEAR if single else PRISMATIC).to_theirs(state, where="model")
    parts: dict[str, Tensors] = {}
    for name, tensor in flat.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts
