"""Vision towers of the transformers library, cut at the feature layer.

A family's file says which classes, which settings, how many tokens precede the patches, and where the
position table is; everything else is here. Blocks after the feature layer, pooling heads, mask tokens and
(unless asked for) the final layer norm are not built at all.

Shapes: B batch, C channels, S image side, V visual tokens, D feature width, N prefix tokens (class,
registers).
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from vlmamba.errors import CheckpointError, ConfigError, MissingFileError
from vlmamba.models.language.versions import recompute_activations
from vlmamba.models.language.weights import check_loaded
from vlmamba.models.vision import sources
from vlmamba.models.vision.base import (
    COMMON_KEYS,
    Selection,
    VisionEncoder,
    blocks_needed,
    check_keys,
    patch_grid,
    square_side,
)


class TransformersEncoder(VisionEncoder):
    """Base of the families that wrap a transformers vision model.

    ``model`` is transformers' own module, truncated, so parameter names are its names, and its attention is
    SDPA.
    """

    checkpoint_types: ClassVar[Mapping[str, str]]
    """model_type found in a checkpoint's config.json (vision-only or two-tower) to the vision model_type."""
    fields: ClassVar[tuple[str, ...]]
    """Settings of the vision config that define the architecture."""
    norm_name: ClassVar[str]
    norm_in_output: ClassVar[bool] = True
    """Whether transformers' last_hidden_state has gone through the final norm."""

    @classmethod
    @abc.abstractmethod
    def classes(cls, model_type: str) -> tuple[Any, Any]:
        """(config class, model class) of transformers for a vision model_type."""

    @classmethod
    def fields_of(cls, model_type: str) -> tuple[str, ...]:
        """Settings that a model_type has."""
        return cls.fields

    @classmethod
    def unused(cls, config: Any) -> dict[str, Any]:
        """Settings that switch off what patch features do not need."""
        return {}

    @abc.abstractmethod
    def prefix_tokens(self) -> int:
        """Tokens before the first patch in the model's output."""

    @abc.abstractmethod
    def resize(self, grid: tuple[int, int]) -> None:
        """Interpolate the position table of ``self.model`` to another grid."""

    @classmethod
    def native_size(cls, config: Any) -> int:
        """Image side that the position table of a config is made for."""
        return square_side(config.image_size, "image_size")

    @classmethod
    def set_native_size(cls, config: Any, image_size: int) -> None:
        """Make a config's position table fit an image side."""
        config.image_size = image_size

    def __init__(
        self,
        full: Any,
        model: nn.Module,
        *,
        feature_layer: int,
        final_norm: bool,
        image_size: int,
        image: Mapping[str, Any],
    ) -> None:
        """Wrap a truncated model; use `from_config` or `from_pretrained`."""
        super().__init__()
        self.full_config = full
        self.model = model
        self.feature_layer = feature_layer
        self.final_norm = final_norm
        self.image_size = image_size
        self.num_channels = full.num_channels
        self.hidden_size = full.hidden_size
        self.image = dict(image)
        self.grid = self._grid(full, image_size)
        if not final_norm:
            setattr(self.body, self.norm_name, nn.Identity())

    @property
    def body(self) -> Any:
        """The module that holds embeddings, encoder and norm (one level down in older transformers)."""
        return getattr(self.model, "vision_model", self.model)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionEncoder:
        """See `vlmamba.models.vision.build_vision_encoder`."""
        where = f"{cls.family} encoder"
        check_keys(config, COMMON_KEYS, where)
        full = cls._config(config.get("config") or {})
        image_size = config.get("image_size") or cls.native_size(full)
        if cls._grid(full, image_size) != cls._grid(full, cls.native_size(full)):
            cls.set_native_size(full, image_size)
        feature_layer, final_norm = config.get("feature_layer", -2), config.get("final_norm", False)
        truncated = cls._truncated(full, feature_layer)
        _, model_class = cls.classes(full.model_type)
        model = model_class(truncated)
        return cls(
            full,
            model,
            feature_layer=feature_layer,
            final_norm=final_norm,
            image_size=image_size,
            image=config.get("image") or {},
        )

    @classmethod
    def from_pretrained(cls, path: Any, wanted: Selection) -> VisionEncoder:
        """See `vlmamba.models.vision.load_vision_encoder`."""
        path = sources.resolve(str(path), family=cls.family)
        full = cls._checkpoint_config(path)
        _, model_class = cls.classes(full.model_type)
        truncated = cls._truncated(full, wanted.feature_layer)
        try:
            with _quiet():
                model, info = model_class.from_pretrained(
                    path,
                    config=truncated,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # told below, with the shapes
                    dtype=wanted.dtype or torch.float32,
                    trust_remote_code=False,
                )
        except OSError as error:
            raise MissingFileError(sources.missing(path, cls.family, str(error).splitlines()[0])) from error
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit the {cls.family} family: {error}") from error
        check_loaded(model, info, where=f"{path} ({cls.family})", leaves_rest=True)
        native = cls.native_size(full)
        encoder = cls(
            full,
            model,
            feature_layer=wanted.feature_layer,
            final_norm=wanted.final_norm,
            image_size=wanted.image_size or native,
            image=sources.image_settings(path, cls.default_image),
        )
        native_grid = cls._grid(full, native)
        if encoder.grid != native_grid:
            sources.log_resize(cls.family, native_grid, encoder.grid, encoder.image_size)
            encoder.resize(encoder.grid)
            cls.set_native_size(full, encoder.image_size)
            cls.set_native_size(truncated, encoder.image_size)
        return encoder

    @classmethod
    def _grid(cls, full: Any, image_size: int) -> tuple[int, int]:
        return patch_grid(image_size, square_side(full.patch_size, "patch_size"), f"{cls.family} encoder")

    @classmethod
    def _config(cls, settings: Mapping[str, Any]) -> Any:
        """The transformers config of the whole tower, from plain settings."""
        where = f"config of the {cls.family} encoder"
        default = next(iter(cls.checkpoint_types.values()))
        model_type = settings.get("model_type", default)
        if model_type not in cls.checkpoint_types.values():
            raise ConfigError(
                f"{where}: model_type {model_type!r} is none of "
                f"{', '.join(sorted(set(cls.checkpoint_types.values())))}."
            )
        config_class, _ = cls.classes(model_type)
        reference = config_class()
        kept = {}
        for key, value in settings.items():
            if key in cls.fields_of(model_type):
                kept[key] = value
            elif not hasattr(reference, key):
                check_keys({key: value}, ("model_type", *cls.fields_of(model_type)), where)
        try:
            return config_class(**kept)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def _checkpoint_config(cls, path: str) -> Any:
        """The vision config of a checkpoint, vision-only or two-tower."""
        found = sources.read_config(path, cls.family)
        model_type = str(found.get("model_type"))
        if model_type not in cls.checkpoint_types:
            raise CheckpointError(
                f"{path} holds a model of type {model_type!r}, which is not of the family {cls.family!r} "
                f"(types: {', '.join(sorted(cls.checkpoint_types))}).{sources.other_family(model_type)}"
            )
        settings = found.get("vision_config", found)
        return cls._config({**settings, "model_type": cls.checkpoint_types[model_type]})

    @classmethod
    def _truncated(cls, full: Any, feature_layer: int) -> Any:
        """The config of the part that runs."""
        blocks = blocks_needed(feature_layer, full.num_hidden_layers, f"{cls.family} encoder")
        settings = {key: getattr(full, key) for key in cls.fields_of(full.model_type)}
        settings |= cls.unused(full)
        settings["num_hidden_layers"] = blocks
        return type(full)(**settings, attn_implementation="sdpa")

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """All tokens of the model's output, (B, N + V, D)."""
        return self.model(pixel_values).last_hidden_state

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `VisionEncoder.features`."""
        tokens = self.run(pixel_values)[:, self.prefix_tokens() :]
        if self.final_norm and not self.norm_in_output:
            tokens = getattr(self.body, self.norm_name)(tokens)
        return tokens

    def set_gradient_checkpointing(self, enabled: bool = True) -> None:
        """See `VisionEncoder.set_gradient_checkpointing`."""
        recompute_activations(self.model, enabled)

    def architecture(self) -> dict[str, Any]:
        """See `VisionEncoder.architecture`."""
        model_type = self.full_config.model_type
        settings = {key: getattr(self.full_config, key) for key in self.fields_of(model_type)}
        return {"model_type": model_type, **settings}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' report of tensors left in the file: towers leave most of a checkpoint there on
    purpose.
    """
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
