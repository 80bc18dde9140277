r"""What trains: explicit patterns over dotted parameter names, and the table that shows the outcome.

A pattern is one of
- a dotted name, ``multi_modal_projector`` or ``language_model.backbone.norm_f.weight``: that parameter, or
all of that module; - a glob, ``language_model.backbone.layers.*.mixer.*``, in which ``*`` also matches dots;
- a regular expression after ``re:``, ``re:language_model\\.backbone\\.layers\\.(1[6-9]|2\\d)\\..*``, matched
in full. A pattern that matches nothing raises: a typo must not freeze what was meant to train.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import nn

from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches


class PartRow(NamedTuple):
    """Parameter counts of one part of the model."""

    name: str
    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """All parameters of the part."""
        return self.trainable + self.frozen


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """A predicate over dotted parameter names.

    Raises:
        ConfigError: The regular expression does not compile.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a valid regular expression: {error}.") from error
        return lambda name: expression.fullmatch(name) is not None
    if any(c in pattern for c in "*?["):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.startswith(f"{pattern}.")


def match_parameters(model: nn.Module, patterns: Sequence[str], *, key: str) -> dict[str, list[str]]:
    """Names of the parameters that each pattern matches.

    Args:
        model: Whose parameters; a tied parameter counts under its first name.
        patterns: See the module's documentation.
        key: Dotted config key the patterns come from, for messages.

    Raises:
        ConfigError: A pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        predicate = compile_pattern(pattern)
        matched[pattern] = [name for name in names if predicate(name)]
        if not matched[pattern]:
            top = list(dict.fromkeys(name.partition(".")[0] for name in names))
            modules = list(dict.fromkeys([*top, *(name.rpartition(".")[0] for name in names)]))
            raise ConfigError(
                f"{key}: the pattern {pattern!r} matches no parameter.{close_matches(pattern, modules)} "
                f"Top-level modules: {', '.join(top)}. Write a module's dotted name, a glob with *, or "
                "re:<expression>."
            )
    return matched


def set_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Let exactly the matching parameters require gradients.

    Returns:
        Their names, in the model's order.

    Raises:
        ConfigError: There is no pattern, or one matches nothing.
    """
    if not patterns:
        raise ConfigError("train: no pattern given, so nothing would train. Name at least one module.")
    matched = set().union(*match_parameters(model, patterns, key="train").values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in matched)
    return [name for name, _ in model.named_parameters() if name in matched]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_modes(model: nn.Module) -> None:
    """Training mode where something trains, evaluation mode in frozen parts.

    Layers that recompute their activations do so in training mode only, so in a frozen part through which
    gradients flow those layers (not what is inside them, hence no dropout) stay in training mode.
    """
    model.train()
    for child in model.children():
        if any(p.requires_grad for p in child.parameters()):
            continue
        child.eval()
        for module in child.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True


def parts_table(model: nn.Module, *, depth: int = 1) -> list[PartRow]:
    """Counts of frozen and trainable parameters per module.

    Args:
        model: May be on the meta device.
        depth: How many names of the dotted path make a part.
    """
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:-1][:depth]) or name
        row = counts.setdefault(part, [0, 0])
        row[0 if parameter.requires_grad else 1] += parameter.numel()
    return [PartRow(name, *row) for name, row in counts.items()]


def format_parts(rows: Iterable[PartRow]) -> str:
    """The table as text, with a total line."""
    rows = list(rows)
    total = PartRow("total", sum(r.trainable for r in rows), sum(r.frozen for r in rows))
    width = max(len(r.name) for r in [*rows, total])
    lines = [f"{'part':<{width}}  {'trainable':>15}  {'frozen':>15}"]
    for row in [*rows, total]:
        lines.append(f"{row.name:<{width}}  {row.trainable:>15,}  {row.frozen:>15,}")
    return "\n".join(lines)
