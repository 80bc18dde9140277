"""What callers ask a processor for, in transformers' words: honoured, without meaning here, or refused by name.

transformers' pipelines, trainers and servers hand every processor the same long list of arguments. One that asks for
nothing is accepted; one that would change the result, and is not honoured, is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vlmamba.errors import ConfigError
from vlmamba.registry import close_matches

_ANY = (True, False)
_IDLE: dict[str, tuple[Any, ...]] = {
    "is_split_into_words": (False,),
    "load_audio_from_video": (False,),
    "return_attention_mask": (True,),  # it always comes
    "return_length": (False,),
    "return_mm_token_type_ids": (False,),
    "return_offsets_mapping": (False,),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_token_type_ids": (False,),
    "sanitize_control_tokens": _ANY,  # text of messages is always literal
    "split_special_tokens": (False,),
    "stride": (0,),
    "use_fast": _ANY,
    "verbose": _ANY,
}
"""Values that ask for nothing that would not be so anyway; None is one for every name."""
_GROUPS = ("common_kwargs", "text_kwargs", "images_kwargs")
_OFF = (False, "do_not_pad", "do_not_truncate")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """How rows become a batch.

    Attributes:
        padding: True or "longest" pads to the longest row, "max_length" to `max_length`, False does not; by default
            rows are padded if tensors are asked for.
        padding_side: "left" (for generation) or "right".
        pad_to_multiple_of: Padded rows get a multiple of this length.
        truncation: Taken, but nothing is ever cut: a row that is too long is an error.
        max_length: Longest row that is accepted, unless `truncation` is False.
        return_tensors: "pt" or "np".
        add_special_tokens: Whether what the tokenizer puts before a text (a BOS) stands before ready-made prompts.

    Raises:
        ConfigError: A value is none of these.
    """

    padding: bool | str | None = None
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    return_tensors: str | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        paddings = (None, True, "longest", "max_length", False, "do_not_pad")
        if self.padding not in paddings or self.padding_side not in ("left", "right"):
            raise ConfigError(
                f"padding is one of {paddings} and padding_side left or right, got padding={self.padding!r} and "
                f"padding_side={self.padding_side!r}"
            )
        if self.padding == "max_length" and self.max_length is None:
            raise ConfigError("padding='max_length' needs max_length")

    def width(self, lengths: Sequence[int]) -> int | None:
        """The length that rows of these lengths are padded to, None for no padding.

        Raises:
            ConfigError: A row is longer than `max_length`.
        """
        limit = None if self.truncation in _OFF else self.max_length
        longest = max(lengths, default=0)
        if limit is not None and longest > limit:
            raise ConfigError(
                f"row {lengths.index(longest)} has {longest} tokens, more than max_length={limit}; vlmamba never cuts "
                "a row, since that could cut an image: leave the row out, raise max_length, or give none (in TRL: "
                "max_length=None in the trainer's config)"
            )
        if self.padding in _OFF or (self.padding is None and self.return_tensors is None):
            return None
        width = self.max_length if self.padding == "max_length" else longest
        assert width is not None
        step = self.pad_to_multiple_of or 1
        return -(-max(width, longest) // step) * step


def read_options(asked: Mapping[str, Any], model_max_length: int) -> BatchOptions:
    """Options from keyword arguments as transformers passes them.

    Args:
        asked: By name; `text_kwargs`, `images_kwargs` and `common_kwargs` may hold some.
        model_max_length: The tokenizer's, which `truncation` alone means.

    Raises:
        ConfigError: Something is asked for that a vlmamba processor does not do.
    """
    flat = {name: value for name, value in asked.items() if name not in _GROUPS}
    for group in _GROUPS:
        flat |= asked.get(group) or {}
    if flat.get("return_tensors") == "auto":
        del flat["return_tensors"]
    flat = {name: value for name, value in flat.items() if value is not None}
    known = [field.name for field in fields(BatchOptions)]
    refused = [
        name
        for name, value in flat.items()
        if name not in known and not any(value is idle for idle in _IDLE.get(name, ()))
    ]
    if refused:
        hints = "".join(close_matches(name, known) for name in refused)
        raise ConfigError(
            f"VLMambaProcessor does not take {', '.join(f'{name}={flat[name]!r}' for name in sorted(refused))}, and "
            f"its chat template has no variable of that name.{hints} Leave it out; how images are prepared is set "
            "when the processor is made and saved with the checkpoint."
        )
    if flat.get("truncation", False) not in _OFF:
        flat.setdefault("max_length", model_max_length)
    return BatchOptions(**{name: flat[name] for name in known if name in flat})
