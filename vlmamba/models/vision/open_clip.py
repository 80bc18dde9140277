"""Any vision tower of open_clip: its own ViT, timm ViTs (SigLIP, EVA-02, ViTamin, PE), and convolutional
towers.

Transformer towers give the patch tokens of the selected block, class and register tokens dropped. Towers
without tokens (ResNet, ConvNeXt, FastViT, Swin) give the feature map of the selected stage, read in raster
order; there feature_layer counts stages instead of blocks.

Shapes: B batch, C channels, S image side, N prefix tokens, V visual tokens, D feature width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vlmamba.errors import CheckpointError, ConfigError, ShapeError, require
from vlmamba.models.vision import open_clip_sources, sources
from vlmamba.models.vision.base import (
    CLIP_MEAN,
    CLIP_STD,
    COMMON_KEYS,
    Selection,
    VisionEncoder,
    blocks_needed,
    check_keys,
    resize_positions,
    square_side,
)

_WHERE = "open_clip encoder"
_CONFIG_KEYS = ("embed_dim", "vision_cfg", "quick_gelu", "text_cfg", "custom_text", "multimodal_cfg")


class OpenClipEncoder(VisionEncoder):
    """A vision tower built by open_clip, cut at the feature layer.

    ``config`` is open_clip's model config (``embed_dim``, ``vision_cfg``, ``quick_gelu``; the text part is
    ignored). ``visual`` is open_clip's own module, so parameter names are those after "visual." in its
    checkpoints.
    """

    family = "open_clip"
    default_image: ClassVar = {"mode": "crop", "mean": CLIP_MEAN, "std": CLIP_STD, "resample": "bicubic"}

    def __init__(
        self,
        model_config: Mapping[str, Any],
        *,
        feature_layer: int,
        final_norm: bool,
        image_size: int,
        image: Mapping[str, Any],
    ) -> None:
        """Random initialisation; use `from_config` or `from_pretrained`."""
        super().__init__()
        self.model_config = {
            "embed_dim": model_config["embed_dim"],
            "quick_gelu": bool(model_config.get("quick_gelu", False)),
            "vision_cfg": {**copy.deepcopy(dict(model_config["vision_cfg"])), "timm_model_pretrained": False},
        }
        self.feature_layer = feature_layer
        self.final_norm = final_norm
        self.image_size = image_size
        self.image = dict(image)
        self.visual = _build_visual(self.model_config)
        self.kind = _kind(self.visual)
        self.stage = _cut(self.visual, self.kind, feature_layer, final_norm)
        self._set_image_size(_native_size(self.visual), image_size)
        _keep_buffers(self.visual)
        self.grid, self.hidden_size = _probe(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> OpenClipEncoder:
        """See `vlmamba.models.vision.build_vision_encoder`."""
        check_keys(config, COMMON_KEYS, _WHERE)
        model_config = config.get("config") or {}
        _check_model_config(model_config, "config")
        return cls(
            model_config,
            feature_layer=config.get("feature_layer", -2),
            final_norm=config.get("final_norm", False),
            image_size=config.get("image_size") or _side(model_config),
            image=config.get("image") or {},
        )

    @classmethod
    def from_pretrained(cls, path: Any, wanted: Selection) -> OpenClipEncoder:
        """See `vlmamba.models.vision.load_vision_encoder`."""
        source = open_clip_sources.locate(str(path))
        _check_model_config(source.model_config, str(path))
        native = _side(source.model_config)
        encoder = cls(
            source.model_config,
            feature_layer=wanted.feature_layer,
            final_norm=wanted.final_norm,
            image_size=native,
            image=open_clip_sources.image_settings(source.preprocess, cls.default_image),
        )
        state = open_clip_sources.visual_state(source.weights)
        try:
            result = encoder.visual.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise CheckpointError(f"{source.weights} does not fit its config: {error}") from error
        buffers = dict(encoder.visual.named_buffers())
        missing = [key for key in result.missing_keys if key not in buffers]
        if missing:
            raise CheckpointError(
                f"{source.weights} is not complete: {len(missing)} tensors of the vision tower are missing, the first "
                f"of them {', '.join(missing[:3])}."
            )
        image_size = wanted.image_size or native
        if image_size != native:
            old = encoder.grid
            encoder._set_image_size(native, image_size)
            _keep_buffers(encoder.visual)
            encoder.grid, encoder.hidden_size = _probe(encoder)
            if encoder.grid != old:
                sources.log_resize(cls.family, old, encoder.grid, image_size)
        encoder.to(wanted.dtype or torch.float32)
        return encoder

    def _set_image_size(self, old: int, new: int) -> None:
        """Make position tables fit another image side."""
        self.image_size = new
        self.model_config["vision_cfg"]["image_size"] = new
        if old == new:
            return
        visual: Any = self.visual
        if self.kind == "timm":
            visual.set_input_size(new)
        elif self.kind == "vit":
            patch_height, patch_width = visual.patch_size
            visual.image_size = (new, new)
            grid = (new // patch_height, new // patch_width)
            if grid != tuple(visual.grid_size):
                positions = visual.positional_embedding
                # open_clip's resize_pos_embed: bicubic, antialiased, the class token's kept
                patches = resize_positions(positions.detach()[1:], grid, mode="bicubic", antialias=True)
                table = torch.cat([positions.detach()[:1], patches])
                visual.positional_embedding = nn.Parameter(table, requires_grad=positions.requires_grad)
                visual.grid_size = grid
        elif hasattr(visual, "set_input_size"):
            visual.set_input_size(new)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `VisionEncoder.features`."""
        visual: Any = self.visual
        if self.kind == "vit":
            tokens = visual.transformer(visual._embeds(pixel_values))[:, 1:]
            return visual.ln_post(tokens) if self.final_norm else tokens
        if self.kind == "timm":
            return visual.trunk.forward_features(pixel_values)[:, visual.trunk.num_prefix_tokens :]
        maps = visual.forward_intermediates(
            pixel_values,
            indices=[self.stage],
            stop_early=True,
            normalize_intermediates=self.final_norm,
            intermediates_only=True,
            output_fmt="NCHW",
        )
        return maps["image_intermediates"][0].flatten(2).transpose(1, 2)

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """See `VisionEncoder.set_gradient_checkpointing`."""
        visual: Any = self.visual
        visual.set_grad_checkpointing(enabled)

    def architecture(self) -> dict[str, Any]:
        """See `VisionEncoder.architecture`."""
        return copy.deepcopy(self.model_config)


def _check_model_config(model_config: Mapping[str, Any], where: str) -> None:
    """Refuse what is not an open_clip model config."""
    check_keys(model_config, (*_CONFIG_KEYS, "init_logit_bias", "init_logit_scale"), f"{_WHERE}, {where}")
    if not isinstance(model_config.get("vision_cfg"), Mapping) or "embed_dim" not in model_config:
        raise ConfigError(
            f"{_WHERE}, {where}: needs 'embed_dim' and 'vision_cfg' as in open_clip's model configs; got the keys "
            f"{sorted(model_config)}."
        )


def _build_visual(model_config: Mapping[str, Any]) -> nn.Module:
    """The whole vision tower at its native image size."""
    require("open_clip", extra="train", feature="the open_clip encoder family")
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    settings = dict(model_config["vision_cfg"])
    check_keys(settings, tuple(CLIPVisionCfg.__dataclass_fields__), f"{_WHERE}, vision_cfg")
    settings["patch_dropout"] = 0.0  # would break the patch grid
    tower: nn.Module = _build_vision_tower(
        model_config["embed_dim"], CLIPVisionCfg(**settings), quick_gelu=model_config["quick_gelu"]
    )
    return tower


def _keep_buffers(visual: nn.Module) -> None:
    """Put computed tables (rotary angles) into the state dict.

    Whoever loads a saved model onto an empty one of the meta device has no other way to fill them.
    """
    for module in visual.modules():
        module._non_persistent_buffers_set.clear()


def _kind(visual: Any) -> str:
    """Kind of tower: "vit" (open_clip's own), "timm" (a timm model of tokens) or "map" (feature maps)."""
    if hasattr(visual, "transformer") and hasattr(visual, "class_embedding"):
        return "vit"
    trunk = getattr(visual, "trunk", None)
    if hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens") and hasattr(trunk, "patch_embed"):
        return "timm"
    if hasattr(visual, "forward_intermediates"):
        return "map"
    raise ConfigError(f"{_WHERE}: {type(visual).__name__} gives neither patch tokens nor feature maps.")


def _cut(visual: Any, kind: str, feature_layer: int, final_norm: bool) -> int:
    """Drop what the feature layer does not need; returns the stage of a "map" tower, else 0."""
    if kind == "vit":
        blocks = visual.transformer.resblocks
        visual.transformer.resblocks = blocks[: blocks_needed(feature_layer, len(blocks), _WHERE)]
        if final_norm and visual.attn_pool is not None:
            raise ConfigError(f"{_WHERE}: final_norm does not fit a tower with an attention pool (CoCa).")
        visual.proj = visual.attn_pool = visual.attn_pool_contrastive = None
        if not final_norm:
            visual.ln_post = nn.Identity()
        return 0
    if kind == "timm":
        trunk = visual.trunk
        trunk.blocks = trunk.blocks[: blocks_needed(feature_layer, len(trunk.blocks), _WHERE)]
        if not final_norm:
            trunk.norm = nn.Identity()
        for name in ("attn_pool", "fc_norm", "head_drop", "head"):
            if getattr(trunk, name, None) is not None:
                setattr(trunk, name, None if name == "attn_pool" else nn.Identity())
        visual.head = nn.Identity()
        return 0
    trunk = getattr(visual, "trunk", visual)
    stages = len(trunk.feature_info) if hasattr(trunk, "feature_info") else 5
    stage = blocks_needed(feature_layer, stages, _WHERE) - 1
    if stage < 0:
        raise ConfigError(
            f"{_WHERE}: feature_layer {feature_layer} selects the embeddings, but this tower of {stages} stages has "
            f"none: choose -{stages} to -1."
        )
    if final_norm and stage != stages - 1:
        raise ConfigError(f"{_WHERE}: final_norm fits only the last of {stages} stages (feature_layer -1).")
    if hasattr(trunk, "prune_intermediate_layers"):
        trunk.prune_intermediate_layers([stage], prune_norm=not final_norm, prune_head=True)
    if hasattr(visual, "head"):
        visual.head = nn.Identity()
    if hasattr(visual, "attnpool"):
        visual.attnpool = nn.Identity()
    return stage


def _native_size(visual: Any) -> int:
    """Image side the tower was built for (timm models know their own; others are built for the asked one)."""
    embed = getattr(getattr(visual, "trunk", None), "patch_embed", None)
    size = getattr(embed, "img_size", None)
    return square_side(size if size is not None else visual.image_size, f"{_WHERE}: image_size")


def _probe(encoder: OpenClipEncoder) -> tuple[tuple[int, int], int]:
    """((H, W), D) of the features."""
    visual: Any = encoder.visual
    if encoder.kind == "vit":
        return (int(visual.grid_size[0]), int(visual.grid_size[1])), int(visual.conv1.out_channels)
    if encoder.kind == "timm":
        height, width = visual.trunk.patch_embed.grid_size
        return (int(height), int(width)), int(visual.trunk.embed_dim)
    # A dry run on the meta device: no memory, no arithmetic.
    shadow: Any = copy.deepcopy(encoder.visual).to("meta").eval()
    size = encoder.image_size
    with torch.no_grad():
        result = shadow.forward_intermediates(
            torch.empty(1, 3, size, size, device="meta"),
            indices=[encoder.stage],
            stop_early=True,
            intermediates_only=True,
            output_fmt="NCHW",
        )["image_intermediates"][0]
    if result.ndim != 4:
        raise ShapeError(f"{_WHERE}: expected a feature map of 4 dimensions, got {tuple(result.shape)}.")
    return (int(result.shape[2]), int(result.shape[3])), int(result.shape[1])


def _side(model_config: Mapping[str, Any]) -> int:
    """Image side that a model config asks for."""
    return square_side(model_config["vision_cfg"].get("image_size", 224), f"{_WHERE}: image_size")
