"""Words that the rooms share: a picture's place in a text, a position without a label, a turn, a named picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from PIL import Image

IMAGE_TOKEN = "<image>"
"""Where a picture stands in a text, as in LLaVA's data."""

IGNORE_INDEX = -100
"""The label of a position that is not supervised, as in PyTorch's and transformers' losses."""

RESERVED = frozenset(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Unicode's noncharacters (section 23.7): chat templates carry marks in them, so no text may hold one."""

Message = dict[str, Any]
"""A turn: ``{"role": "system"|"user"|"assistant", "content": [{"type": "image"} | {"type": "text", "text": str}]}``; an
answer that is not to be learnt has ``"loss": False``."""


@dataclass(frozen=True)
class StoredImage:
    """A picture's file inside something larger (a shard, a table), read when it is needed.

    Attributes:
        name: What it is called in messages; two with the same name are the same picture.
        read: Its bytes. What it raises when they cannot be had becomes an `ImageError`.
    """

    name: str
    read: Callable[[], bytes] = field(compare=False, repr=False)


ImageRef = Union[Path, bytes, StoredImage, "Image.Image"]
"""A picture as data sets and tasks name it: a file, the bytes of a file, how to read them, or one already open."""
