"""`MambaLM`: a Mamba language model with transformers' interface and parameter names.

Shapes: B batch, L length, D model width, V vocabulary rows.

Against transformers' MambaForCausalLM it adds: packed rows (`seq_idx`), exact padding on either side, a cache
that may be continued with any number of tokens, projections called as modules (adapters work on all of them),
and a loss that computes logits at supervised positions only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, MambaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmamba.errors import ConfigError, ShapeError
from vlmamba.models.language.blocks import MambaBackbone, RMSNorm
from vlmamba.models.language.cache import MambaCache, RealFirst, keep_rows_without_tokens
from vlmamba.models.language.families import LanguageFamily, LanguageInput, LanguageOutput
from vlmamba.models.language.loading import load_mamba
from vlmamba.models.language.loss import apply_head, loss_from_logits, next_token_loss, select_rows
from vlmamba.models.language.versions import CACHE, cache_of, one_cache
from vlmamba.ssm.mixer import FP32_PARAMETERS, MambaMixer


@dataclass
class MambaLMOutput(CausalLMOutputWithPast):
    """Loss, logits, cache and hidden states; fields as in transformers."""

    @property
    def cache_params(self) -> MambaCache | None:
        """The cache under the name that transformers' Mamba had for it."""
        cache: MambaCache | None = cache_of(self)
        return cache


class MambaLM(PreTrainedModel, GenerationMixin):
    """Mamba with a language-model head; `transformers.MambaConfig` describes it.

    Args:
        config: Sizes and initialisation. `tie_word_embeddings` ties the head to the embeddings.
    """

    config: MambaConfig
    config_class = MambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MambaBlock",)
    _keep_in_fp32_modules_strict = FP32_PARAMETERS
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.backbone = MambaBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the reference code does (mamba_ssm/models/mixer_seq_simple.py, `_init_weights`).

        Embeddings are normal with `config.initializer_range` (0.02 there); the mixer has its own scheme;
        out_proj is divided by sqrt(layers) when `config.rescale_prenorm_residual` (True there).
        """
        if isinstance(module, MambaMixer):
            module.reset_parameters()
            if self.config.rescale_prenorm_residual:
                scaled = module.out_proj.weight / math.sqrt(self.config.num_hidden_layers)
                init.copy_(module.out_proj.weight, scaled)
        elif isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load weights: transformers' `-hf` layout or the original state-spaces/mamba one, told by
        config.json.

        Reads safetensors and weights-only pickles, single files and shards. Every weight must be there and
        fit.

        Args:
            pretrained_model_name_or_path: Local directory or hub id; None with `config` and `state_dict`, as
                in transformers.
            *args: As in transformers.
            **kwargs: As in transformers (dtype, device_map, revision, config, ...).

        Returns:
            The model in eval mode (and the loading report, with `output_loading_info`).

        Raises:
            MissingFileError: No such directory, or files are missing in it.
            CheckpointError: The weights do not fit the config, or a pickle holds more than weights.
        """
        own = super().from_pretrained
        if pretrained_model_name_or_path is None:
            return own(None, *args, **kwargs)
        return load_mamba(cls, own, pretrained_model_name_or_path, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.backbone.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def run_backbone(
        self,
        inputs_embeds: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: MambaCache | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Hidden states of embedded tokens.

        Args:
            inputs_embeds: (B, L, D).
            attention_mask: (B, >= L), 0 at padding, anywhere; the last L columns are this input's.
            seq_idx: (B, L) sample index within packed rows.
            cache: Continued and updated in place when given.
            output_hidden_states: Also return every block's output.

        Returns:
            The last hidden states (B, L, D) and those of all blocks, or None. Values at padding mean nothing.

        Raises:
            ShapeError: Mask, seq_idx or cache do not fit the input.
        """
        batch, length = inputs_embeds.shape[:2]
        if seq_idx is not None and seq_idx.shape != (batch, length):
            raise ShapeError(f"seq_idx has shape {tuple(seq_idx.shape)} but the input is {(batch, length)}")
        if seq_idx is not None and cache is not None and cache.get_seq_length():
            raise ShapeError(
                f"seq_idx was given with a cache of {cache.get_seq_length()} tokens; a packed row starts without a "
                "cache, so pass seq_idx or a cache, not both"
            )
        moved = None
        if attention_mask is not None:
            moved = RealFirst.from_mask(attention_mask, length)
            past = 0 if cache is None else cache.get_seq_length()
            if attention_mask.shape not in ((batch, length), (batch, past + length)):
                raise ShapeError(
                    f"attention_mask has shape {tuple(attention_mask.shape)} but the input is {(batch, length)}, with "
                    f"{past} columns on the cache; cover the input, or both"
                )
            inputs_embeds = moved.apply(inputs_embeds)
            seq_idx = None if seq_idx is None else moved.apply(seq_idx)
        state = before = None
        if cache is not None:
            dtype = self.backbone.embeddings.weight.dtype
            state = cache.start(self.config, batch, dtype=dtype, device=inputs_embeds.device)
            if moved is not None and cache.get_seq_length() > 0:
                before = state.clone()
            plain = moved is None and not output_hidden_states and not torch.is_grad_enabled()
            if length == 1 and plain:
                hidden = cache.decode(self.backbone, inputs_embeds[:, 0])
                if hidden is not None:
                    cache.advance(1)
                    return hidden.unsqueeze(1), None
        hidden, collected = self.backbone(
            inputs_embeds,
            seq_idx=seq_idx,
            state=state,
            state_at=moved.last() if moved is not None and state is not None else None,
            output_hidden_states=output_hidden_states,
        )
        if cache is not None and state is not None:
            if moved is not None:
                keep_rows_without_tokens(state, before, moved.counts)
            cache.advance(length)
        if moved is not None:
            hidden = moved.undo(hidden)
            collected = None if collected is None else tuple(moved.undo(layer) for layer in collected)
        return hidden, collected

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        past_key_values: MambaCache | None = None,
        cache_params: MambaCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = 0,
        num_items: int | torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cache: MambaCache | None = None,
    ) -> MambaLMOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            input_ids: (B, L); either these or `inputs_embeds`.
            attention_mask: (B, L), 0 at padding on either side; with a cache it may cover earlier columns
                too.
            inputs_embeds: (B, L, D).
            seq_idx: (B, L) sample index within packed rows; nothing passes from one sample to the next.
            past_key_values: Another name for `cache`.
            cache_params: Another name for `cache`.
            labels: (B, L), -100 where unsupervised; shifted inside.
            use_cache: Return a cache. By default `config.use_cache` when neither training nor recording
                gradients.
            logits_to_keep: Which logits to return: 0 all, n the last n, an index, or a bool mask; None for
                none, which with `labels` computes logits at supervised positions only.
            num_items: Divides the summed loss instead of the number of supervised tokens.
            output_hidden_states: Also return the hidden states of every block.
            output_attentions: There are none; only False is accepted.
            return_dict: False for a plain tuple.
            cache: Of an earlier call, to continue; updated in place.

        Returns:
            `loss`, `logits` (fp32), the cache (`past_key_values`; `cache` from transformers 5.24 on) and
            `hidden_states`; those that were not asked for are
            None.

        Raises:
            ShapeError: Inputs that do not fit together.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ShapeError("pass exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ShapeError("Mamba has no attention weights to output; leave output_attentions unset")
        given = one_cache({"cache": cache, "past_key_values": past_key_values, "cache_params": cache_params})
        if inputs_embeds is None:
            inputs_embeds = self.backbone.embeddings(input_ids)
        cache = self.cache_for(given, use_cache)
        hidden, collected = self.run_backbone(
            inputs_embeds,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            cache=cache,
            output_hidden_states=bool(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        )
        logits = loss = None
        if logits_to_keep is not None:
            logits = apply_head(self.lm_head, select_rows(hidden, logits_to_keep, attention_mask))
        if labels is not None:
            of_rows: dict[str, Any] = {
                "attention_mask": attention_mask,
                "seq_idx": seq_idx,
                "num_items": num_items,
            }
            if logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0:
                loss = loss_from_logits(logits, labels, **of_rows)
            else:
                loss = next_token_loss(hidden, self.lm_head, labels, **of_rows)
        fields: dict[str, Any] = {"loss": loss, "logits": logits, CACHE: cache, "hidden_states": collected}
        output = MambaLMOutput(**fields)
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return output if use_dict else output.to_tuple()

    def cache_for(self, cache: MambaCache | None, use_cache: bool | None) -> MambaCache | None:
        """The cache of this pass: the given one, a fresh one, or none (as under gradient checkpointing)."""
        if self.training and any(block.gradient_checkpointing for block in self.backbone.layers):
            return None
        if cache is None:
            recording = self.training or torch.is_grad_enabled()
            wanted = self.config.use_cache and not recording if use_cache is None else use_cache
            return MambaCache() if wanted else None
        if not isinstance(cache, MambaCache):
            raise ShapeError(
                f"the cache is a {type(cache).__name__} but MambaLM continues a MambaCache; "
                "pass the cache that an earlier call returned, or none"
            )
        return cache

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        cuda_graphs: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs for `generate`: the mask matters at the prompt only.

        `cuda_graphs` is an argument of `generate`, read where the cache is made.

        Raises:
            ShapeError: `seq_idx` was given; the samples of a packed row cannot be continued.
        """
        if seq_idx is not None:
            raise ShapeError(
                "generate continues rows, not packed samples: pass them as padded rows, without seq_idx"
            )
        cache = one_cache(kwargs)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if use_cache and cache is not None and not is_first_iteration:
            inputs["attention_mask"] = None
        return inputs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Called by `generate`: put an empty cache into its keyword arguments."""
        prepare_mamba_cache(generation_config, model_kwargs)


def prepare_mamba_cache(generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Give `generate` a `MambaCache`, unless it has one or wants none.

    Raises:
        ConfigError: `cuda_graphs` without a cache.
    """
    cuda_graphs = bool(model_kwargs.pop("cuda_graphs", False))
    if cuda_graphs and generation_config.use_cache is False:
        raise ConfigError("cuda_graphs=True records steps on a cache; leave use_cache on")
    given = one_cache(model_kwargs)
    if given is not None:
        if not isinstance(given, MambaCache):
            raise ShapeError(
                f"the cache is a {type(given).__name__} but Mamba continues a MambaCache; pass the cache that an "
                "earlier call returned, or none"
            )
        given._is_user_defined = True
        given.cuda_graphs = cuda_graphs or given.cuda_graphs
    if given is not None or generation_config.use_cache is not False:
        model_kwargs[CACHE] = MambaCache(cuda_graphs=cuda_graphs) if given is None else given


def build(config: MambaConfig) -> MambaLM:
    """A model with random weights."""
    return MambaLM(config)


def load(path: str | Path, dtype: torch.dtype | str | None = None, **options: Any) -> MambaLM:
    """A model with its weights; see `MambaLM.from_pretrained`.

    Raises:
        ConfigError: An implementation of attention was asked for.
    """
    if options.get("attn_implementation") is not None:
        raise ConfigError(
            f"Mamba has no attention, so attn_implementation={options['attn_implementation']!r} "
            "(model.language.attention) means nothing for it; leave it out"
        )
    if dtype is not None:
        options["dtype"] = dtype
    model: MambaLM = MambaLM.from_pretrained(path, **options)
    return model


def run(model: Any, given: LanguageInput) -> LanguageOutput:
    """See `families.run_language_model`."""
    cache = model.cache_for(given.cache, given.use_cache)
    hidden, collected = model.run_backbone(
        given.inputs_embeds,
        attention_mask=given.attention_mask,
        seq_idx=given.seq_idx,
        cache=cache,
        output_hidden_states=given.output_hidden_states,
    )
    return LanguageOutput(hidden, cache, collected)


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    prepare_mamba_cache(generation_config, model_kwargs)


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return apply_head(model.lm_head, hidden)


def family(config: MambaConfig) -> LanguageFamily:
    """Mamba can do everything."""
    return LanguageFamily(
        build=build,
        load=load,
        run=run,
        logits=_logits,
        prepare_cache=_prepare_cache,
        stateful=True,
        needs_mask_after_prompt=False,
    )
