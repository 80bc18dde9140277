"""From a run to a plain transformers directory, with the connector beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmamba.common.digests import write_digests
from vlmamba.common.files import replace_json, replaced_directory
from vlmamba.models.builder import CONNECTOR_CONFIG_FILE, CONNECTOR_FILE
from vlmamba.models.language.weights import save_tensors
from vlmamba.ssm.mixer import keeps_fp32
from vlmamba.training.init_from import CONNECTOR
from vlmamba.training.lora import ADAPTER, has_adapters, merged_state, save_adapter

EXPORT = "export"


def export_model(model: Any, processor: Any, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write model, processor and connector.

    The connector alone is also written, in the precision it was trained in: ``connector.safetensors`` and
    ``connector_config.json``. Adapters are merged into the weights, and written alone into ``adapter/``. A digest of
    every file is in ``digests.json`` (transformers' own files have no room for it).

    Args:
        model: A `VLMambaForConditionalGeneration`.
        processor: Its processor.
        directory: Replaced as a whole when it exists.
        dtype: Of the exported weights, but for the few that stay in float32 (`vlmamba.ssm.mixer.FP32_PARAMETERS`).

    Returns:
        The directory.

    Raises:
        CheckpointError: The disk is full or fails; an earlier export stays.
    """
    with replaced_directory(directory) as target:
        connector = getattr(model, CONNECTOR)
        whole = merged_state(model)
        state = {
            name: tensor.to(torch.float32 if keeps_fp32(name) else dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in whole.items()
        }
        previous = model.config.dtype
        model.config.dtype = dtype
        try:
            model.save_pretrained(target, state_dict=state)
        finally:
            model.config.dtype = previous
        processor.save_pretrained(target)
        if has_adapters(model.state_dict()):
            save_adapter(model, target / ADAPTER)
        prefix = f"{CONNECTOR}."
        tensors = {n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}
        save_tensors(tensors, target / CONNECTOR_FILE)
        description = {
            "name": connector.name,
            "options": dict(connector.options),
            "vision_dim": connector.vision_dim,
            "text_dim": connector.text_dim,
            "grid": list(connector.grid),
        }
        replace_json(target / CONNECTOR_CONFIG_FILE, description)
        write_digests(target)
    return directory
