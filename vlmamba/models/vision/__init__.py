"""Vision encoders: images to a grid of patch features.

One family a file. A family of your own is a `VisionEncoder` subclass in any module, named ``package.module:Class``,
which is also its attribute `family`; one that comes with vlmamba has its line in the table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmamba.errors import ConfigError
from vlmamba.models.vision.base import Selection, VisionEncoder
from vlmamba.registry import Registry

if TYPE_CHECKING:
    import torch

encoders: Registry[type[VisionEncoder]] = Registry("vision encoder", VisionEncoder)
encoders.add("siglip", "vlmamba.models.vision.siglip:SiglipEncoder")
encoders.add("siglip2", "vlmamba.models.vision.siglip2:Siglip2Encoder")
encoders.add("clip", "vlmamba.models.vision.clip:ClipEncoder")
encoders.add("dinov2", "vlmamba.models.vision.dinov2:Dinov2Encoder")
encoders.add("open_clip", "vlmamba.models.vision.open_clip:OpenClipEncoder")
encoders.add("fused", "vlmamba.models.vision.fused:FusedEncoder")


def build_vision_encoder(config: Mapping[str, Any]) -> VisionEncoder:
    """Build a randomly initialised encoder from a plain dictionary.

    Works under ``with torch.device("meta")`` too, where it allocates nothing.

    Args:
        config: ``{"family": ..., "feature_layer": -2, "final_norm": False, "image_size": 384, "config":
            {...}}``, as given by ``VisionEncoder.config_dict()`` or by
            `vlmamba.models.vision.presets.preset_config`. For the family "fused": ``{"family": "fused",
            "encoders": [config, ...]}``.

    Returns:
        The encoder; `config_dict()` of it rebuilds it exactly.

    Raises:
        ConfigError: Unknown family or key, or a value that does not fit.
    """
    family = config.get("family")
    if not isinstance(family, str):
        raise ConfigError(
            f"a vision config needs 'family', one of {', '.join(encoders.names())}; got the keys "
            f"{sorted(config)}."
        )
    return _family(family).from_config(config)


def _family(name: str) -> type[VisionEncoder]:
    found = encoders.get(name)
    if ":" in name and found.family != name:
        raise ConfigError(
            f"vision encoder {name!r}: its attribute family is {found.family!r}; a checkpoint is rebuilt by it, so "
            f"write family = {name!r} in the class."
        )
    return found


def load_vision_encoder(
    family: str,
    path: Any,
    *,
    feature_layer: int | None = None,
    image_size: int | None = None,
    final_norm: bool = False,
    dtype: torch.dtype | None = None,
) -> VisionEncoder:
    """Load a pre-trained encoder.

    Only what the selected feature layer needs is kept: later blocks, pooling heads and text towers are
    dropped. Position embeddings are interpolated (once, in fp32) when ``image_size`` asks for another grid
    than the checkpoint's.

    Args:
        family: A registered family.
        path: A local directory (vision-only or two-tower checkpoint, told apart by content) or a hub id.
            "fused" takes ``"dinov2=PATH,siglip=PATH"`` or a list of ``{"family": ..., "path": ...}``.
            "open_clip" also takes the file of a checkpoint with its ``open_clip_config.json`` beside it, or
            ``"MODEL:TAG"``.
        feature_layer: Index into the hidden states as in transformers (0 = embeddings, -1 = last block, -2 =
            second-to-last block). Default -2.
        image_size: Side of the square input in pixels; the checkpoint's own by default.
        final_norm: Apply the tower's final layer norm to the selected features (off, as in LLaVA).
        dtype: dtype of the parameters; float32 by default.

    Returns:
        The encoder, with gradients enabled (freeze it by ``requires_grad_(False)``).

    Raises:
        ConfigError: Unknown family, feature layer out of range.
        MissingFileError: Nothing at ``path``; the message says where to get it.
        CheckpointError: The checkpoint is of another family or incomplete.
    """
    layer = -2 if feature_layer is None else feature_layer
    return _family(family).from_pretrained(path, Selection(layer, image_size, final_norm, dtype))


__all__ = ["VisionEncoder", "build_vision_encoder", "encoders", "load_vision_encoder"]
