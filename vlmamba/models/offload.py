"""Models of which accelerate keeps parts on disk (`device_map`)."""

from __future__ import annotations

from typing import Any

from vlmamba.errors import ConfigError

_TIED_ON_DISK = "1.15"
"""accelerate before it gives layers the weights of tied embeddings that come from disk."""


def check_disk(model: Any) -> None:
    """Refuse a model whose weights the installed accelerate would mix up.

    Raises:
        ConfigError: Parts are on disk, the head is the embeddings, and accelerate is too old for that.
    """
    places = (getattr(model, "hf_device_map", None) or {}).values()
    if "disk" not in places or not model.config.tie_word_embeddings:
        return
    import accelerate
    from packaging.version import Version  # as transformers has it

    if Version(accelerate.__version__) < Version(_TIED_ON_DISK):
        raise ConfigError(
            f"parts on disk (device_map) of a model whose head is its embeddings need accelerate {_TIED_ON_DISK} or "
            f"newer, which does not mix up their weights; installed is {accelerate.__version__}: upgrade it, or load "
            "without a disk part"
        )
