"""From a run to a plain transformers directory, with the connector beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlmamba.models.builder import CONNECTOR_CONFIG_FILE, CONNECTOR_FILE
from vlmamba.ssm.mixer import keeps_fp32
from vlmamba.training.init_from import CONNECTOR
from vlmamba.training.lora import ADAPTER, has_adapters, merged_state, save_adapter
from vlmamba.training.run_dir import whole_directory, write_errors

EXPORT = "export"


def export_model(model: Any, processor: Any, directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write model, processor and connector.

    The connector alone is also written, in the precision it was trained in: ``connector.safetensors`` and
    ``connector_config.json``. Adapters are merged into the weights, and written alone into ``adapter/``.

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
    from safetensors.torch import save_file

    with whole_directory(directory) as target:
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
            with write_errors():
                model.save_pretrained(target, state_dict=state)
        finally:
            model.config.dtype = previous
        processor.save_pretrained(target)
        if has_adapters(model.state_dict()):
            save_adapter(model, target / ADAPTER)
        prefix = f"{CONNECTOR}."
        tensors = {
            name.removeprefix(prefix): t.detach().cpu().contiguous()
            for name, t in whole.items()
            if name.startswith(prefix)
        }
        with write_errors():
            save_file(tensors, target / CONNECTOR_FILE, metadata={"format": "pt"})
        description = {
            "name": connector.name,
            "options": dict(connector.options),
            "vision_dim": connector.vision_dim,
            "text_dim": connector.text_dim,
            "grid": list(connector.grid),
        }
        (target / CONNECTOR_CONFIG_FILE).write_text(
            json.dumps(description, indent=2) + "\n", encoding="utf-8"
        )
    return directory
