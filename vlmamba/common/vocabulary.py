"""Words that the rooms share: a picture's place in a text, a position without a label, a turn of a conversation."""

from __future__ import annotations

from typing import Any

IMAGE_TOKEN = "<image>"
"""Where a picture stands in a text, as in LLaVA's data."""

IGNORE_INDEX = -100
"""The label of a position that is not supervised, as in PyTorch's and transformers' losses."""

Message = dict[str, Any]
"""A turn: ``{"role": "system"|"user"|"assistant", "content": [{"type": "image"} | {"type": "text", "text": str}]}``."""
