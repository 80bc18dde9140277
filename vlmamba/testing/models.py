"""A vision-language model of a few thousand parameters, with every part of a real one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import LlamaConfig, MambaConfig, PreTrainedTokenizerFast

from vlmamba.models import (
    VLMambaConfig,
    VLMambaForConditionalGeneration,
    VLMambaImageProcessor,
    VLMambaProcessor,
)
from vlmamba.models.chat import load_template
from vlmamba.models.connectors import build_connector
from vlmamba.testing.families import tiny_config

CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: What is in the image?",
    "The image shows a red square on a blue field. How many digits are there? Two. Where is the seven? Top left.",
    "User: Describe the picture. Assistant: a green circle, a yellow line and three black dots.",
)
END_OF_TEXT = "<|endoftext|>"
IMAGE_SIZE, PATCH_SIZE = 16, 4


@lru_cache(maxsize=1)
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-NeoX's properties: no BOS, pad = eos = unk = ``<|endoftext|>`` = 0."""
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )


def tiny_processor(num_image_tokens: int = 16, chat: str = "vicuna_v1") -> VLMambaProcessor:
    """Processor of `tiny_model`: 16 x 16 pixels, 4 x 4 patches."""
    half = [0.5] * 3
    return VLMambaProcessor(
        VLMambaImageProcessor(size=IMAGE_SIZE, mode="resize", mean=half, std=half, resample="bicubic"),
        tiny_tokenizer(),
        chat_template=load_template(chat),
        num_image_tokens=num_image_tokens,
    )


def tiny_vision_config(feature_layer: int = -2) -> dict[str, Any]:
    """A two-block SigLIP tower of width 24."""
    return {
        "family": "siglip",
        "feature_layer": feature_layer,
        "image_size": IMAGE_SIZE,
        "config": {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
    }


def tiny_text_config(language: str = "mamba") -> Any:
    """A two-layer language model of 368 vocabulary rows: "mamba" or "llama", of width 32, or a type of `families`."""
    if language not in ("mamba", "llama"):
        return tiny_config(language, vocab_size=368, eos_token_id=0)
    common = {
        "vocab_size": 368,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "eos_token_id": 0,
    }
    if language == "mamba":
        return MambaConfig(**common, state_size=4, bos_token_id=0, initializer_range=0.05)
    return LlamaConfig(
        **common, intermediate_size=48, num_attention_heads=4, bos_token_id=None, tie_word_embeddings=False
    )


TINY_OPTIONS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "vss-mlp": {"state_size": 4},
    "vss-l2": {"state_size": 4},
    "qmamba": {
        "num_queries": 6,
        "depth": 2,
        "width": 16,
        "num_heads": 2,
        "state_size": 4,
        "pre_options": {"state_size": 4},
    },
}


def tiny_model(
    connector: str = "mlp", *, language: str = "mamba", chat: str = "vicuna_v1", seed: int = 0, **options: Any
) -> tuple[VLMambaForConditionalGeneration, VLMambaProcessor]:
    """A whole model with random weights, and its processor.

    Args:
        connector: Name of the connector.
        language: "mamba", "llama" or another of `TINY_FAMILIES`.
        chat: Chat template.
        seed: Seed of the weights; the caller's random state is left alone.
        **options: The connector's options, over the tiny defaults.

    Returns:
        The model (eval mode) and the processor.
    """
    options = {**TINY_OPTIONS.get(connector, {}), **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_config = tiny_text_config(language)
        size = build_connector(
            connector, vision_dim=24, text_dim=text_config.hidden_size, grid=(4, 4), **options
        ).num_tokens
        processor = tiny_processor(size, chat)
        config = VLMambaConfig(
            vision_config=tiny_vision_config(),
            connector_config={"name": connector, "options": options},
            text_config=text_config,
            image_token_id=processor.image_token_id,
        )
        model = VLMambaForConditionalGeneration(config)
    return model.eval(), processor
