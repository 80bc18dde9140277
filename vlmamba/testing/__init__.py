"""Tiny models, a tiny tokenizer and tiny data sets, for tests of vlmamba and of projects built on it."""

from __future__ import annotations

from vlmamba.testing.data import write_images, write_llava_json
from vlmamba.testing.models import tiny_model, tiny_processor, tiny_tokenizer

__all__ = ["tiny_model", "tiny_processor", "tiny_tokenizer", "write_images", "write_llava_json"]
