"""What can be changed in a trained model before it is asked: scan directions (Q-Mamba, table 4), number of queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches

SWITCHES = ("scan", "num_queries")


def apply_switches(model: Any, processor: Any, switches: Mapping[str, Any]) -> None:
    """Change the connector of a loaded model, and its processor with it.

    Args:
        model: A `VLMambaForConditionalGeneration`.
        processor: Its processor.
        switches: ``{"scan": "forward"}`` sets the directions, ``{"num_queries": 16}`` keeps so many queries.

    Raises:
        ConfigError: An unknown switch, or one that this connector does not have.
    """
    connector = model.multi_modal_projector
    for name, value in switches.items():
        if name == "scan":
            connector.set_scan(str(value))
        elif name == "num_queries":
            connector.set_num_queries(int(value))
        else:
            raise ConfigError(
                f"unknown switch {name!r}.{close_matches(name, list(SWITCHES))} There are: {', '.join(SWITCHES)}."
            )
    processor.num_image_tokens = connector.num_tokens
