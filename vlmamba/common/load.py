"""A trained model by its path: the one set of rules for whoever runs, measures, serves or looks into one.

The models are imported where they are loaded: this module costs nothing to import.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmamba.common.digests import DIGESTS, check_folder
from vlmamba.common.files import read_json
from vlmamba.common.processes import pick_device, read_launch
from vlmamba.errors import CheckpointError, ConfigError, MissingFileError, VLMambaError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXPORT = "export"
"""Folder of a run that holds its exported model."""
DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> tuple[Any, Any]:
    """Load a trained model, ready to be asked, and its processor.

    Every file is compared with the digest that was written with it; nothing that is read can run code.

    Args:
        path: A run (its export, or, where it has none yet, its newest checkpoint), a checkpoint, an exported model, or
            "owner/name" of one on the Hugging Face hub.
        device: Where to: a device of torch, or "auto" for the GPU of this process where there is one.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU and float32 elsewhere.

    Returns:
        A `VLMambaForConditionalGeneration` in evaluation mode, and its `VLMambaProcessor`.

    Raises:
        MissingFileError: There is no such model.
        CheckpointError: A file is damaged, the weights do not fit their config, or it is a model of another kind.
        ConfigError: The device is not there, or the dtype unknown.
    """
    import torch

    place = pick_device(str(device), read_launch().local_rank)
    if dtype == "auto":
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
        dtype = getattr(torch, dtype)
    folder = find_model(path)
    if is_checkpoint(folder):
        from vlmamba.ssm.mixer import keeps_fp32
        from vlmamba.training.run import read_checkpoint

        logger.info("loading the checkpoint %s: the run has no export yet", folder)
        model, processor, _ = read_checkpoint(folder)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(place, torch.float32 if keeps_fp32(name) else dtype)
        return model.requires_grad_(False).to(place).eval(), processor
    from vlmamba.models import VLMambaForConditionalGeneration, VLMambaProcessor
    from vlmamba.models.language.causality import check_causal
    from vlmamba.models.language.weights import check_loaded

    check_folder(folder)
    with transformers_errors(folder):
        model, info = VLMambaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        processor = VLMambaProcessor.from_pretrained(folder, trust_remote_code=False)
    check_loaded(model, info, where=str(folder))
    check_causal(model.language_model)
    return model.to(place).eval(), processor


def load_processor(path: str | Path) -> Any:
    """The processor of a trained model alone.

    Raises:
        MissingFileError: There is no such model, or it has no export.
        CheckpointError: A file of it is damaged.
    """
    from vlmamba.models import VLMambaProcessor

    folder = find_model(path)
    if is_checkpoint(folder):
        raise MissingFileError(
            f"{path} has no export, which holds the processor. Export it: vlmamba convert {folder} {folder}-export"
        )
    check_folder(folder)
    with transformers_errors(folder):
        return VLMambaProcessor.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def transformers_errors(folder: Path) -> Iterator[None]:
    """What transformers and the libraries below it raise over a damaged folder, as one error that names it."""
    try:
        yield
    except VLMambaError:
        raise
    except Exception as error:
        said = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder} cannot be read: {said}. A file is missing, damaged or of another model; copy or export it again."
        ) from error


def find_model(path: str | Path) -> Path:
    """The folder of an exported model or of a checkpoint that a path means; see `load_model`.

    Raises:
        MissingFileError: It means none.
        CheckpointError: It is a model of another kind, such as a language model alone.
    """
    given = Path(path).expanduser()
    if not given.exists():
        from vlmamba.models.language.loading import resolve_directory
        from vlmamba.models.vision.sources import looks_like_hub_id

        given = resolve_directory(path) if looks_like_hub_id(str(path)) else given
    for candidate in (given, given / EXPORT):
        if (candidate / "config.json").is_file():
            config = read_json(candidate / "config.json")
            kind = config.get("model_type") if isinstance(config, dict) else None
            if kind != "vlmamba":
                raise CheckpointError(
                    f"{candidate / 'config.json'} is of a model of type {kind!r}, which sees no image: give a run or "
                    "an export of a vision-language model."
                )
            return candidate
        if (candidate / DIGESTS).is_file():
            raise CheckpointError(f"{candidate / 'config.json'} is missing. Copy or export the model again.")
    if is_checkpoint(given):
        return given
    if (given / "checkpoints").is_dir():
        from vlmamba.training.checkpoint import latest_checkpoint

        newest = latest_checkpoint(given)
        if newest is not None:
            return newest
    state = "it holds neither an export nor a checkpoint" if given.is_dir() else "there is no such directory"
    raise MissingFileError(
        f"no exported model at {given}: {state}. Give a run (runs/NAME), one of its checkpoints, or an exported model."
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run."""
    return (folder / "state.json").is_file()
