"""VLMambaForConditionalGeneration: encoder -> connector -> Mamba (or any causal language model).

``R = LLM([V_out; tokens(Q)])`` (VL-Mamba, arXiv 2403.13600, eq. 1): visual tokens take the places that the processor
left for them; nothing is spliced or moved here, and a count that does not fit raises.

`VLMambaModel` ends at the last hidden states, as transformers' LlavaModel does; `VLMambaForConditionalGeneration` adds
logits, loss and `generate`. Both hold the same three parts under the same names.

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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from vlmamba.errors import ShapeError
from vlmamba.models.configuration import VLMambaConfig
from vlmamba.models.connectors import Connector, build_connector
from vlmamba.models.language import (
    LanguageOutput,
    build_language_model,
    family_of,
    language_logits,
    prepare_generation_cache,
    run_language_model,
)
from vlmamba.models.language.loading import restore_buffers
from vlmamba.models.language.loss import next_token_loss, select_rows
from vlmamba.models.language.versions import CACHE, one_cache
from vlmamba.models.offload import check_disk
from vlmamba.models.positions import samples_of_rows
from vlmamba.models.vision import build_vision_encoder
from vlmamba.models.vision.base import VisionEncoder
from vlmamba.ssm.checks import check_integers
from vlmamba.ssm.mixer import FP32_PARAMETERS


@dataclass
class VLMambaOutput(CausalLMOutputWithPast):
    """What the model returns; the names are those of the installed transformers.

    Attributes:
        loss: Sum of the supervised tokens' cross-entropies over their number (or over `num_items`).
        logits: (B, L', X) at the positions asked for.
        cache: The language model's cache; `past_key_values` before transformers 5.24.
        hidden_states: Those of every layer of the language model, if asked for.
    """


class VLMambaPreTrainedModel(PreTrainedModel):
    """The three parts, and visual tokens among text tokens.

    Args:
        config: Describes the parts.
        vision_tower: A ready encoder; built from the config with random weights when left out.
        multi_modal_projector: A ready connector, likewise.
        language_model: A ready language model, likewise.
    """

    config_class = VLMambaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ("cache", "past_key_values")
    _no_split_modules = ("MambaMixer",)  # in connectors; the language model names its own
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
        # The language model's attention is the whole's: what TRL loads a reference model with.
        config._attn_implementation = self.language_model.config._attn_implementation
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; buffers that are not saved are worked out again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_disk(model)
        restore_buffers(model.language_model)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Every part initialises its own weights where it is built."""

    def get_input_embeddings(self) -> nn.Module:
        """The language model's embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(n, C, S, S) pixels to (n, T, D) visual tokens; a frozen encoder runs without a graph."""
        features = self.vision_tower(pixel_values)
        floating = (p.dtype for p in self.multi_modal_projector.parameters() if p.is_floating_point())
        return self.multi_modal_projector(features.to(next(floating, features.dtype)))

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

    def _hidden_states(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        position_ids: Tensor | None,
        seq_idx: Tensor | None,
        caches: dict[str, Any],
        use_cache: bool | None,
        output_hidden_states: bool | None,
        others: dict[str, Any],
    ) -> tuple[LanguageOutput, Tensor | None]:
        """Everything below the head, and the samples that rows are packed from.

        `caches` are the cache under its names, `others` what was passed besides; for the rest see
        `VLMambaForConditionalGeneration.forward`.
        """
        cache = one_cache(caches)
        shape = _shape(input_ids, inputs_embeds)
        seq_idx = samples_of_rows(position_ids, attention_mask, seq_idx, cache, shape, others)
        _refuse_unknown(others)
        if inputs_embeds is None:
            assert input_ids is not None
            check_integers("the model", "input_ids", input_ids, limit=self.config.text_config.vocab_size)
            # A decoding step has no image; looking for placeholders would make the host wait for the GPU.
            past = 0 if cache is None else cache.get_seq_length()
            plain = pixel_values is None and past > 0 and input_ids.shape[1] == 1 and not self.training
            inputs_embeds = (
                self.get_input_embeddings()(input_ids) if plain else self.embed(input_ids, pixel_values)
            )
        elif pixel_values is not None:
            raise ShapeError(
                "pixel_values need input_ids, which say where the visual tokens go; inputs_embeds hold them already "
                "(model.embed(input_ids, pixel_values) makes such)"
            )
        elif inputs_embeds.shape[-1] != self.config.text_config.hidden_size:
            raise ShapeError(
                f"inputs_embeds have shape {tuple(inputs_embeds.shape)} but the language model's width is "
                f"{self.config.text_config.hidden_size}; model.embed(input_ids, pixel_values) makes such"
            )
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        output = run_language_model(
            self.language_model,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cache=cache,
            use_cache=bool(use_cache),
            output_hidden_states=output_hidden_states,
        )
        return output, seq_idx


class VLMambaModel(VLMambaPreTrainedModel):
    """The model without its head's result: what `AutoModel` loads, and `base_model` of the whole one."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Run all but the head; arguments as of `VLMambaForConditionalGeneration.forward`.

        Returns:
            `last_hidden_state` (B, L, D), after the language model's last norm, the cache and `hidden_states`.
        """
        (hidden, filled, layers), _ = self._hidden_states(
            input_ids,
            pixel_values,
            attention_mask,
            inputs_embeds,
            position_ids,
            seq_idx,
            {"cache": cache, "past_key_values": past_key_values},
            use_cache,
            output_hidden_states,
            kwargs,
        )
        fields: dict[str, Any] = {"last_hidden_state": hidden, CACHE: filled, "hidden_states": layers}
        output = BaseModelOutputWithPast(**fields)
        return output.to_tuple() if return_dict is False else output


class VLMambaForConditionalGeneration(VLMambaPreTrainedModel, GenerationMixin):
    """A vision-language model with Mamba as its language model."""

    def __init__(self, config: VLMambaConfig, **parts: Any) -> None:
        super().__init__(config, **parts)
        # A recurrent state cannot be cropped: generate must know, and not try assisted decoding.
        self._is_stateful = family_of(self.language_model).stateful

    @property
    def model(self) -> VLMambaModel:
        """The same parts without the head, in the form that transformers' LLaVA has; nothing is copied."""
        headless: VLMambaModel = VLMambaModel.__new__(VLMambaModel)
        nn.Module.__init__(headless)
        headless.config, headless.training = self.config, self.training
        headless.name_or_path = self.name_or_path
        headless._modules.update(self._modules)
        return headless

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | None = 0,
        num_items: int | Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> VLMambaOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: (B, L) ids, images as placeholder ids.
            pixel_values: (n, C, S, S), the images of all rows in order.
            attention_mask: (B, L), 0 at padding, on either side; with a cache it covers the earlier columns too.
            inputs_embeds: (B, L, D) in place of ids, the visual tokens in their places.
            past_key_values: Another name for `cache`.
            seq_idx: (B, L) segment ids of rows packed from several samples; samples do not see one another.
            labels: (B, L), -100 where nothing is to be learnt. A label belongs to its own position; the shift is made
                here.
            logits_to_keep: How many last positions, which positions (index tensor), or a (B, L) bool mask. 0 is all;
                None is none, since a loss needs only the supervised rows, which it picks itself.
            num_items: Divisor of the loss instead of this call's supervised tokens (all ranks, all micro-steps).
            use_cache: Return a cache.
            return_dict: False for a tuple.
            cache: Of an earlier call, continued here.
            position_ids: (B, L); where they start anew without a mask or a cache, a packed sample starts (the form
                that transformers has for packed rows). Otherwise positions follow from the mask.
            num_items_in_batch: Another name for `num_items`, transformers' Trainer's.
            output_hidden_states: Also return the hidden states of every layer of the language model.
            **kwargs: Passed by transformers' generate; ignored if None or False, an error otherwise.

        Returns:
            A `VLMambaOutput`.

        Raises:
            ShapeError: Inputs do not fit together.
            ConfigError: The language model cannot do this exactly.
        """
        (hidden, filled, layers), seq_idx = self._hidden_states(
            input_ids,
            pixel_values,
            attention_mask,
            inputs_embeds,
            position_ids,
            seq_idx,
            {"cache": cache, "past_key_values": past_key_values},
            use_cache,
            output_hidden_states,
            kwargs,
        )
        loss = logits = None
        if labels is not None:
            loss = next_token_loss(
                hidden,
                self._logits,
                labels,
                attention_mask=attention_mask,
                seq_idx=seq_idx,
                num_items=num_items if num_items_in_batch is None else num_items_in_batch,
            )
        if logits_to_keep is not None:
            logits = self._logits(select_rows(hidden, logits_to_keep, attention_mask))
        fields: dict[str, Any] = {"loss": loss, "logits": logits, CACHE: filled, "hidden_states": layers}
        output = VLMambaOutput(**fields)
        return output.to_tuple() if return_dict is False else output

    def _logits(self, hidden: Tensor) -> Tensor:
        return language_logits(self.language_model, hidden)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs for `generate`: images go in with the prompt, once.

        `cuda_graphs` is an argument of `generate`, read where the cache is made (`models/language/decode.py`).

        Raises:
            ShapeError: `seq_idx` was given; the samples of a packed row cannot be continued. Or a cache that leaves
                nothing of the prompt.
        """
        if kwargs.pop("seq_idx", None) is not None:
            raise ShapeError(
                "generate continues rows, not packed samples: pass them as padded rows, without seq_idx"
            )
        kwargs.pop("tokenizer", None)  # that of stop_strings, which generate lets through
        cache = one_cache(kwargs)
        held = 0 if cache is None else cache.get_seq_length()
        columns = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if is_first_iteration and held and held >= columns:
            raise ShapeError(
                f"the cache holds {held} columns and the prompt has {columns}: generate takes the whole prompt, and "
                "a cache of its first columns that leaves one at least, whose logits it needs"
            )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        prompt = is_first_iteration or cache is None
        inputs["pixel_values"] = pixel_values if prompt else None
        inputs.pop("position_ids", None)  # they follow from the mask
        if not prompt and not family_of(self.language_model).needs_mask_after_prompt:
            inputs["attention_mask"] = None
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Called by `generate` for beams and several sequences a row: a row's pictures are repeated together."""
        pixels = model_kwargs.pop("pixel_values", None)
        if pixels is not None and expand_size > 1:
            tokens = self.multi_modal_projector.num_tokens
            counts = ((input_ids == self.config.image_token_id).sum(dim=1) // tokens).tolist()
            if sum(counts) != pixels.shape[0]:
                raise ShapeError(
                    f"the rows hold placeholders of {counts} image(s), {tokens} tokens each, but pixel_values hold "
                    f"{pixels.shape[0]}"
                )
            pixels = torch.cat([row for group in pixels.split(counts) for row in [group] * expand_size])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, model_kwargs if pixels is None else {**model_kwargs, "pixel_values": pixels}

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


def _shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ShapeError("give either input_ids or inputs_embeds, and not both")
    name, given = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
    assert given is not None
    if given.dim() != 2 + (input_ids is None) or not given.numel():
        raise ShapeError(
            f"{name} have shape {tuple(given.shape)}, but there must be a row and a column at least: "
            f"({'B, L' if input_ids is not None else 'B, L, D'})"
        )
    return given.shape[0], given.shape[1]


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    # transformers passes these along to every model; for a model that has no use for them they are as good as absent.
    passed_along = {"cache_position", "token_type_ids", "mm_token_type_ids"}
    unknown = sorted(
        name
        for name, value in kwargs.items()
        if name not in passed_along and value is not None and value is not False
    )
    if unknown:
        raise TypeError(f"VLMambaForConditionalGeneration.forward() does not take {', '.join(unknown)}")
