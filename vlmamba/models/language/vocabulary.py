"""Room for added tokens in a model's vocabulary, and tokenizers from local directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmamba.errors import ConfigError, MissingFileError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@torch.no_grad()
def ensure_token_fits(model: Any, token_id: int) -> int:
    """Make sure that the embeddings have a row for a token.

    Mamba's vocabularies are padded (50,277 tokens, 50,280 rows), so an added token usually has a row already,
    and the checkpoint keeps its shape. Otherwise the embeddings (and the head) grow to the next multiple; new
    rows start as the mean of the old ones, so that no new token is more likely than an average one.

    Args:
        model: A language model of transformers' interface.
        token_id: The token.

    Returns:
        Number of rows now.

    Raises:
        ConfigError: The id is negative.
    """
    if token_id < 0:
        raise ConfigError(f"token id {token_id} is negative; is the token in the tokenizer?")
    rows = int(model.get_input_embeddings().weight.shape[0])
    if token_id < rows:
        return rows
    model.resize_token_embeddings(token_id + 1, pad_to_multiple_of=8, mean_resizing=False)
    tensors = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not tensors[0]:
        tensors.append(head.weight)
    for weight in tensors:
        weight[rows:] = weight[:rows].float().mean(dim=0).to(weight.dtype)
    return int(tensors[0].shape[0])


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """The tokenizer of a directory or hub id (fast, slow or sentencepiece).

    Args:
        path: Directory or hub id.
        **options: Keyword arguments of transformers' `from_pretrained`.

    Raises:
        MissingFileError: The directory has no tokenizer.
        ConfigError: transformers cannot read it.
    """
    from transformers import AutoTokenizer

    directory = Path(path)
    if directory.is_dir() and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise MissingFileError(
            f"{directory}: no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). The original "
            "state-spaces/mamba checkpoints come without one: they use EleutherAI/gpt-neox-20b's; put its "
            "tokenizer.json and tokenizer_config.json there, or name it as the tokenizer."
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: transformers cannot load a tokenizer from it: {error}") from error
