"""Words that the rooms share: a picture's place in a text, a position without a label, a turn of a conversation."""

from __future__ import annotations

from typing import Any

IMAGE_TOKEN = "<image>"
"""Where a picture stands in a text, as in LLaVA's data."""

IGNORE_INDEX = -100
"""The label of a position that is not supervised, as in PyTorch's and transformers' losses."""

RESERVED = frozenset(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Unicode's noncharacters (section 23.7): chat templates carry marks in them, so no text may hold one."""

Message = dict[str, Any]
"""A turn: ``{"role": "system"|"user"|"assistant", "content": [{"type": "image"} | {"type": "text", "text": str}]}``; an
answer that is not to be learnt has ``"loss": False``."""
