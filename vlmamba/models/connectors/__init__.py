"""Connectors: patch features of an image to tokens of the language model.

A connector of your own is a `Connector` subclass in any module, named ``package.module:Class``; one that comes with
vlmamba has its line here.
"""

from __future__ import annotations

from typing import Any

from vlmamba.models.connectors.base import Connector, check_options
from vlmamba.registry import Registry

CONNECTORS: Registry[type[Connector]] = Registry("connector", Connector)
CONNECTORS.add("mlp", "vlmamba.models.connectors.mlp:MLPConnector")
CONNECTORS.add("vss-mlp", "vlmamba.models.connectors.vss:VSSMLPConnector")
CONNECTORS.add("vss-l2", "vlmamba.models.connectors.vss:VSSL2Connector")
CONNECTORS.add("qmamba", "vlmamba.models.connectors.qmamba:QMambaConnector")


def build_connector(
    name: str, *, vision_dim: int, text_dim: int, grid: tuple[int, int], **options: Any
) -> Connector:
    """Build a connector with fresh weights.

    Args:
        name: "mlp", "vss-mlp", "vss-l2", "qmamba", or ``package.module:Class``.
        vision_dim: Width of the patch features.
        text_dim: Width of the language model's embeddings.
        grid: Rows and columns of patches.
        **options: The connector's own options (its constructor's keyword arguments).

    Raises:
        ConfigError: Unknown name, unknown option or a value that does not fit.
    """
    cls = CONNECTORS.get(name)
    check_options(name, cls, options)
    connector = cls(vision_dim=vision_dim, text_dim=text_dim, grid=grid, **options)
    connector.name, connector.options = name, dict(options)
    return connector


__all__ = ["CONNECTORS", "Connector", "build_connector"]
