"""VLMambaForConditionalGeneration: encoder -> connector -> Mamba (or any causal language model).

``R = LLM([V_out; tokens(Q)])`` (VL-Mamba, arXiv 2403.13600, eq. 1): visual tokens take the places that the processor
left for them; nothing is spliced or moved here, and a count that does not fit raises.

Shapes: B rows, L length, n images, C channels, S image size, V patches, F vision width, T visual tokens an image,
D text width, X vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from vlmamba.errors import ShapeError
from vlmamba.models.configuration import VLMambaConfig
from vlmamba.models.connectors import Connector, build_connector
from vlmamba.models.language import (
    build_language_model,
    language_family,
    prepare_generation_cache,
    run_language_model,
)
from vlmamba.models.language.loss import apply_head, next_token_loss, select_rows
from vlmamba.models.vision import build_vision_encoder
from vlmamba.models.vision.base import VisionEncoder
from vlmamba.ssm.mixer import FP32_PARAMETERS


@dataclass
class VLMambaOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: Sum of the supervised tokens' cross-entropies over their number (or over `num_items`).
        logits: (B, L', X) at the positions asked for; with labels, None unless they are asked for.
        past_key_values: The language model's cache.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None


class VLMambaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language model with Mamba as its language model.

    Args:
        config: Describes the parts.
        vision_tower: A ready encoder; built from the config with random weights when left out.
        multi_modal_projector: A ready connector, likewise.
        language_model: A ready language model, likewise.
    """

    config_class = VLMambaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = (
        FP32_PARAMETERS  # those of the connectors' layers; the language model names its own
    )

    def __init__(
        self,
        config: VLMambaConfig,
        *,
        vision_tower: VisionEncoder | None = None,
        multi_modal_projector: Connector | None = None,
        language_model: Any = None,
    ) -> None:
        super().__init__(config)
        text_dim = config.text_config.hidden_size
        self.vision_tower = vision_tower or build_vision_encoder(config.vision_config)
        self.multi_modal_projector = multi_modal_projector or build_connector(
            config.connector_config["name"],
            vision_dim=self.vision_tower.hidden_size,
            text_dim=text_dim,
            grid=self.vision_tower.grid,
            **config.connector_config.get("options", {}),
        )
        self.language_model = language_model or build_language_model(config.text_config)
        # A recurrent state cannot be cropped: generate must know, and not try assisted decoding.
        self._is_stateful = language_family(config.text_config).stateful
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Every part initialises its own weights where it is built."""

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(n, C, S, S) pixels to (n, T, D) visual tokens; a frozen encoder runs without a graph."""
        features = self.vision_tower(pixel_values)
        weight = next(self.multi_modal_projector.parameters())
        return self.multi_modal_projector(features.to(weight.dtype))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Token embeddings with the visual tokens in their places, (B, L, D).

        In training encoder and connector run without images too (their result counts zero times), so that every rank
        of a parallel run makes the same calls.

        Raises:
            ShapeError: Placeholders and visual tokens differ in number.
        """
        embeds = self.get_input_embeddings()(input_ids)
        places = input_ids == self.config.image_token_id
        if pixel_values is None:
            if bool(places.any()):
                raise ShapeError(
                    f"the text holds {int(places.sum())} image placeholders (id {self.config.image_token_id}) but "
                    "no pixel_values were given"
                )
            return embeds + 0.0 * self._dummy_features().sum().to(embeds.dtype) if self.training else embeds
        visual = self.get_image_features(pixel_values)
        if int(places.sum()) != visual.shape[0] * visual.shape[1]:
            raise ShapeError(
                f"the text holds {int(places.sum())} image placeholders (id {self.config.image_token_id}) but "
                f"{visual.shape[0]} image(s) give {visual.shape[0]} x {visual.shape[1]} visual tokens; "
                "encode text and images with the processor of this checkpoint"
            )
        return embeds.masked_scatter(places.unsqueeze(-1), visual.to(embeds.dtype))

    def _dummy_features(self) -> Tensor:
        tower = self.vision_tower
        size = (1, tower.num_channels, tower.image_size, tower.image_size)
        return self.get_image_features(torch.zeros(size, device=self.device, dtype=self.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items: int | Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> VLMambaOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: (B, L) ids, images as placeholder ids.
            pixel_values: (n, C, S, S), the images of all rows in order.
            attention_mask: (B, L), 0 at padding, on either side.
            inputs_embeds: (B, L, D) in place of ids (then without images).
            past_key_values: Cache of an earlier call, continued here.
            seq_idx: (B, L) segment ids of rows packed from several samples; samples do not see one another.
            labels: (B, L), -100 where nothing is to be learnt. A label belongs to its own position; the shift is made
                here.
            logits_to_keep: How many last positions, which positions (index tensor), or a (B, L) bool mask. 0 is all.
                When left out: all, and none if there are labels, since the loss needs only supervised rows.
            num_items: Divisor of the loss instead of this call's supervised tokens (all ranks, all micro-steps).
            use_cache: Return a cache.
            return_dict: False for a tuple.
            **kwargs: Passed by transformers' generate; ignored if None, an error otherwise.

        Returns:
            A `VLMambaOutput`.

        Raises:
            ShapeError: Inputs do not fit together.
        """
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("give either input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            assert input_ids is not None
            # A decoding step has no image; looking for placeholders would make the host wait for the GPU.
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            plain = pixel_values is None and past > 0 and input_ids.shape[1] == 1 and not self.training
            inputs_embeds = (
                self.get_input_embeddings()(input_ids) if plain else self.embed(input_ids, pixel_values)
            )
        elif pixel_values is not None:
            raise ShapeError("pixel_values need input_ids, which say where the visual tokens go")
        hidden, cache = run_language_model(
            self.language_model,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
        )
        head = self.language_model.get_output_embeddings()
        loss = logits = None
        if labels is not None:
            loss = next_token_loss(
                hidden, head, labels, attention_mask=attention_mask, seq_idx=seq_idx, num_items=num_items
            )
        if labels is None or logits_to_keep is not None:
            logits = apply_head(
                head, select_rows(hidden, 0 if logits_to_keep is None else logits_to_keep, attention_mask)
            )
        output = VLMambaOutput(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs for `generate`: images go in with the prompt, once.

        `cuda_graphs` is an argument of `generate`, read where the cache is made (`models/language/decode.py`).
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        prompt = is_first_iteration or past_key_values is None
        inputs["pixel_values"] = pixel_values if prompt else None
        if not prompt and not language_family(self.config.text_config).needs_mask_after_prompt:
            inputs["attention_mask"] = None
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Called by `generate`: the language model's own kind of cache."""
        prepare_generation_cache(self.language_model, generation_config, model_kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save a plain transformers directory; the connector's present scan is what is recorded."""
        connector = self.multi_modal_projector
        self.config.connector_config = {"name": connector.name, "options": dict(connector.options)}
        super().save_pretrained(str(Path(save_directory)), **kwargs)


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    # transformers' generate passes these along to every model; a recurrent model has no use for them.
    passed_along = {
        "cache_position",
        "position_ids",
        "output_attentions",
        "output_hidden_states",
        "token_type_ids",
    }
    unknown = sorted(k for k, v in kwargs.items() if k not in passed_along and v is not None)
    if unknown:
        raise TypeError(f"VLMambaForConditionalGeneration.forward() does not take {', '.join(unknown)}")
