"""Several encoders whose features are concatenated on the channel axis, patch by patch (Cobra: DINOv2 and
SigLIP).

Every encoder gets its own normalisation of the same picture: the input has 3 channels per encoder, in order.

Shapes: B batch, n encoders, S image side, V visual tokens, D sum of the encoders' widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlmamba.errors import ConfigError
from vlmamba.models.vision import build_vision_encoder, encoders
from vlmamba.models.vision.base import Selection, VisionEncoder, check_keys

_KEYS = ("family", "encoders", "image_size")


class FusedEncoder(VisionEncoder):
    """Channel concatenation of encoders that share image size and patch grid.

    Args:
        towers: Two or more encoders, none of them fused.

    Raises:
        ConfigError: Fewer than two, or their image sizes or grids differ.
    """

    family = "fused"

    def __init__(self, towers: Sequence[VisionEncoder]) -> None:
        super().__init__()
        if len(towers) < 2:
            raise ConfigError(f"a fused encoder needs two encoders or more, got {len(towers)}.")
        first = towers[0]
        for tower in towers[1:]:
            if tower.image_size != first.image_size or tower.grid != first.grid:
                raise ConfigError(
                    f"fused encoders must share image size and patch grid: {first.family} has {first.image_size} px "
                    f"and {first.grid[0]} x {first.grid[1]} patches, {tower.family} has {tower.image_size} px and "
                    f"{tower.grid[0]} x {tower.grid[1]}. Set one image_size, and choose encoders of one patch size."
                )
        self.towers = nn.ModuleList(towers)
        self.grid = first.grid
        self.image_size = first.image_size
        self.hidden_size = sum(tower.hidden_size for tower in towers)
        self.num_channels = sum(tower.num_channels for tower in towers)
        self.feature_layer = first.feature_layer
        self.final_norm = first.final_norm

    @property
    def _towers(self) -> list[VisionEncoder]:
        return [tower for tower in self.towers if isinstance(tower, VisionEncoder)]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FusedEncoder:
        """See `vlmamba.models.vision.build_vision_encoder`."""
        check_keys(config, _KEYS, "fused encoder")
        parts = [dict(part) for part in config.get("encoders") or ()]
        size = config.get("image_size")
        for part in parts:
            if size is not None:
                part["image_size"] = size
        return cls([build_vision_encoder(part) for part in parts])

    @classmethod
    def from_pretrained(cls, path: Any, wanted: Selection) -> FusedEncoder:
        """See `vlmamba.models.vision.load_vision_encoder`.

        Without ``image_size`` the last encoder's own is used for all (Cobra: SigLIP's 384 px).
        """
        parts = _parts(path)
        family, where = parts[-1]
        last = encoders.get(family).from_pretrained(where, wanted)
        same = replace(wanted, image_size=last.image_size)
        return cls(
            [*(encoders.get(family).from_pretrained(where, same) for family, where in parts[:-1]), last]
        )

    def config_dict(self) -> dict[str, Any]:
        """See `VisionEncoder.config_dict`."""
        return {
            "family": self.family,
            "image_size": self.image_size,
            "encoders": [tower.config_dict() for tower in self._towers],
        }

    def image_defaults(self) -> dict[str, Any]:
        """See `VisionEncoder.image_defaults`.

        Means and standard deviations one after the other. Geometry is shared: the encoders' own where they
        agree, else a plain resize (as Cobra) with the last encoder's filter.
        """
        each = [tower.image_defaults() for tower in self._towers]
        modes = {settings["mode"] for settings in each}
        return {
            "size": self.image_size,
            "mode": modes.pop() if len(modes) == 1 else "resize",
            "mean": [x for settings in each for x in settings["mean"]],
            "std": [x for settings in each for x in settings["std"]],
            "resample": each[-1]["resample"],
        }

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `VisionEncoder.features`."""
        parts = pixel_values.split([tower.num_channels for tower in self._towers], dim=1)
        return torch.cat([tower(part) for tower, part in zip(self._towers, parts, strict=True)], dim=-1)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """See `VisionEncoder.set_gradient_checkpointing`."""
        for tower in self._towers:
            tower.set_gradient_checkpointing(enabled)


def _parts(path: Any) -> list[tuple[str, str]]:
    """(family, path) of every encoder, in order of channels."""
    if isinstance(path, str):
        pairs = [item.partition("=") for item in path.split(",")]
        parts = [(family.strip(), where.strip()) for family, _, where in pairs]
    elif isinstance(path, Sequence):
        parts = [(str(item.get("family", "")), str(item.get("path", ""))) for item in path]
    else:
        parts = []
    if not parts or any(not family or not where for family, where in parts):
        raise ConfigError(
            f"the path of a fused encoder names each encoder's family and path, as in "
            f"'dinov2=checkpoints/dinov2-large,siglip=checkpoints/siglip-so400m-patch14-384'; got {path!r}."
        )
    for family, _ in parts:
        encoders.get(family)
    return parts
