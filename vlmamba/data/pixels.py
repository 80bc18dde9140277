"""The memory of a micro-batch's pictures, written once.

n images, C channels, S image side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info


class PixelBuffer:
    """Pictures of samples one after another in one tensor, so that joining them into a batch copies nothing.

    In a worker process it is memory that the main process reads too.

    Args:
        expected: Number of pictures that room is made for; more are taken.
    """

    def __init__(self, expected: int) -> None:
        self.expected = max(expected, 1)
        self.used = 0
        self._memory: torch.Tensor | None = None

    def add(self, image_processor: Any, pictures: Sequence[Image.Image]) -> torch.Tensor | None:
        """Preprocess pictures into the next places.

        Returns:
            A view of them, (n, C, S, S) float32; None when the image processor cannot say its `output_shape`.
        """
        shape = getattr(image_processor, "output_shape", None)
        if shape is None:
            return None
        places = self._room(len(pictures), shape)
        for picture, place in zip(pictures, places.numpy(), strict=True):
            image_processor.process_one(picture, place)
        self.used += len(pictures)
        return places

    def whole(self) -> torch.Tensor:
        """All pictures, (n, C, S, S)."""
        assert self._memory is not None, "no picture was added"
        return self._memory[: self.used]

    def _room(self, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        needed = self.used + count
        if self._memory is None:
            self._memory = _allocate((max(needed, self.expected), *shape))
        elif needed > len(self._memory):
            grown = _allocate((2 * needed, *shape))
            grown[: self.used] = self._memory[: self.used]
            self._memory = grown
        return self._memory[self.used : needed]


def _allocate(shape: tuple[int, ...]) -> torch.Tensor:
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, dtype=np.float32))  # numpy asks for large pages: fewer faults
    like = torch.empty(0)
    storage = like._typed_storage()._new_shared(math.prod(shape), device="cpu")
    return like.new(storage).resize_(shape)
