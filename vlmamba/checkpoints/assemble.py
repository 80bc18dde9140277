"""A whole model of a checkpoint that holds a connector and a language model alone, as Cobra's runs do."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors.torch import load_file

from vlmamba.checkpoints.convert import CONNECTOR_FILE, LANGUAGE_DIRECTORY, convert
from vlmamba.errors import CheckpointError
from vlmamba.models import VLMambaForConditionalGeneration, VLMambaProcessor
from vlmamba.models.builder import ModelConfig, build_model
from vlmamba.models.language.weights import check_fits


def assemble(
    source: str | Path, config: ModelConfig
) -> tuple[VLMambaForConditionalGeneration, VLMambaProcessor]:
    """The weights of `source`, with the encoders, tokenizer, chat template and image settings of a recipe.

    Args:
        source: A Cobra run or file, or LLaVA's projector, whose language model is then the recipe's.
        config: The recipe's model.

    Raises:
        MissingFileError: Encoders or tokenizer of the recipe are not there.
        CheckpointError: There is no connector in it, or it does not fit the recipe's.
    """
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder) / "parts"
        convert(source, parts)
        if not (parts / CONNECTOR_FILE).is_file():
            raise CheckpointError(f"{source}: holds no connector alone, so there is nothing to assemble")
        if (parts / LANGUAGE_DIRECTORY).is_dir():
            tokenizer = config.language.tokenizer or config.language.path
            language = config.language.replace(path=str(parts / LANGUAGE_DIRECTORY), tokenizer=tokenizer)
            config = config.replace(language=language)
        model, processor = build_model(config)
        state, connector = load_file(parts / CONNECTOR_FILE), model.multi_modal_projector
        check_fits(state, {n: t.shape for n, t in connector.state_dict().items()}, where=str(source))
        connector.load_state_dict(state)
    return model.eval(), processor
