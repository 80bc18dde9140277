"""From a directory or a hub id to a model with all of its weights, or an error saying what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.errors import CheckpointError, MissingFileError
from vlmamba.models.language.state_spaces import (
    config_from_original,
    is_original_config,
    transformers_name,
)
from vlmamba.models.language.weights import (
    check_fits,
    check_loaded,
    load_state_dict_dir,
    load_state_dict_file,
    weight_files,
)

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def model_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are about the model, not about where its files are."""
    return {key: value for key, value in options.items() if key not in (*HUB_OPTIONS, "subfolder")}


def resolve_directory(path: str | Path, **options: Any) -> Path:
    """The local directory of a checkpoint; a hub id is downloaded (safetensors if it has them, else pickles).

    Args:
        path: Directory, or "owner/name" on the Hugging Face hub.
        **options: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, `subfolder`; others
            are ignored.

    Raises:
        MissingFileError: No such directory, and the hub has no such id or cannot be reached.
    """
    subfolder = options.get("subfolder") or ""
    if Path(path).is_dir():
        return Path(path) / subfolder
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise MissingFileError(
            f"{name}: no such directory (and not an owner/name id of the Hugging Face hub)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    prefix = f"{subfolder}/" if subfolder else ""

    def download(*patterns: str) -> Path:
        found = snapshot_download(name, allow_patterns=[prefix + pattern for pattern in patterns], **hub)
        return Path(found) / subfolder

    try:
        directory = download("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
        if not any(directory.glob("*.safetensors")):
            directory = download("*.bin")
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise MissingFileError(
            f"{name}: no such local directory, and it could not be downloaded from the Hugging Face hub "
            f"({reason[0] if reason else type(error).__name__}). Check the id, or download it elsewhere "
            "and pass its directory."
        ) from error
    return directory


def read_config_dict(directory: str | Path) -> dict[str, Any]:
    """The content of a directory's config.json.

    Raises:
        MissingFileError: There is none.
        CheckpointError: It is not a JSON object.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise MissingFileError(
            f"{file}: no such file; a checkpoint directory needs its config.json beside the weights"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(raw).__name__}, not an object")
    return raw


def read_config(directory: str | Path, family: str | None = None) -> Any:
    """The transformers config of a language model's directory, of either layout, or of a family of the user's own.

    The module of such a family may register its type with transformers.

    Raises:
        MissingFileError: There is no config.json.
        CheckpointError: It describes no known model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    from vlmamba.models.language.families import FAMILIES, OWN_FAMILY

    if family is not None:
        FAMILIES.get(family)
    raw = read_config_dict(directory)
    where = str(Path(directory) / "config.json")
    if is_original_config(raw):
        return config_from_original(raw, where)
    if "model_type" not in raw:
        raise CheckpointError(
            f"{where}: neither transformers' layout (no 'model_type') nor the original state-spaces/mamba "
            f"one (no 'd_model' and 'n_layer'); it has {', '.join(sorted(raw)) or 'nothing'}"
        )
    if "auto_map" in raw and raw["model_type"] not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{where}: model_type {raw['model_type']!r} is code of its own (auto_map: {raw['auto_map']}), and vlmamba "
            "runs no code that comes with a checkpoint. Use a release of transformers that has this type, or a "
            "checkpoint in the layout of a type that it has"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if family is not None:
            setattr(config, OWN_FAMILY, family)
        return config
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{where}: transformers cannot read it: {error}") from error


def load_mamba(
    cls: Any, from_state_dict: Callable[..., Any], path: str | Path, *args: Any, **options: Any
) -> Any:
    """What `MambaLM.from_pretrained` does; see there.

    Args:
        cls: The class to build.
        from_state_dict: transformers' own `from_pretrained`, bound to it.
        path: Directory or hub id.
        *args: Handed on.
        **options: Handed on, less those about the hub.
    """
    directory = resolve_directory(path, **options)
    kept = model_options(options)
    with_info = kept.pop("output_loading_info", False)
    any_shape = kept.get("ignore_mismatched_sizes", False)
    config = kept.pop("config", None)
    if config is None:
        config = read_config(directory)
        if config.model_type != "mamba":
            raise CheckpointError(
                f"{directory / 'config.json'}: model_type is {config.model_type!r}, but MambaLM is for "
                "'mamba'; load_language_model loads either"
            )
        for key in [key for key in kept if hasattr(config, key) and key not in ("dtype", "torch_dtype")]:
            setattr(config, key, kept.pop(key))
    state = {transformers_name(name): tensor for name, tensor in load_state_dict_dir(directory).items()}
    with torch.device("meta"):
        skeleton = cls(config)
    _check_mamba(skeleton, state, str(directory), any_shape)
    model, info = from_state_dict(
        None, *args, config=config, state_dict=state, output_loading_info=True, **kept
    )
    model.config._name_or_path = model.name_or_path = str(path)
    _load_generation_config(model, directory)
    return (model, info) if with_info else model


def load_strictly(auto_class: Any, path: str | Path, **options: Any) -> nn.Module:
    """`auto_class.from_pretrained`, but keys and shapes must all fit.

    Raises:
        MissingFileError: No such directory, or files are missing in it.
        CheckpointError: Missing or unexpected keys, other shapes, or a pickle that holds more than weights.
    """
    directory = resolve_directory(path, **options)
    for file in weight_files(directory):
        if file.suffix != ".safetensors":
            load_state_dict_file(file)
    kept = {key: value for key, value in model_options(options).items() if value is not None}
    model, info = auto_class.from_pretrained(
        directory,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **kept,
    )
    check_loaded(model, info, where=str(directory))
    typed: nn.Module = model
    return typed


def restore_buffers(model: Any) -> None:
    """Work out again the buffers that a checkpoint does not hold, where the model was loaded as a part of another one.

    transformers initialises a model's missing values module by module, and takes a part of which every weight was in
    the file for finished: what its `_init_weights` alone makes (Falcon-H1's multipliers) stays as the memory was.

    Args:
        model: A causal language model of transformers with its weights, which are left alone.

    Raises:
        CheckpointError: Its own initialisation would have written over weights.
    """
    lost = {id(buffer) for _, buffer in _unsaved_buffers(model)}
    if not lost:
        return
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in lost]
    versions = [tensor._version for tensor in tensors]
    for tensor in tensors:
        tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()
    if versions != [tensor._version for tensor in tensors]:
        raise CheckpointError(
            f"language model {model.config.model_type!r}: buffers that its checkpoint does not hold cannot be worked "
            "out without its weights being written over; load it by itself (load_language_model)"
        )


def _unsaved_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"{path}.{name}", buffer)
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]


def _check_mamba(skeleton: Any, state: Mapping[str, torch.Tensor], where: str, any_shape: bool) -> None:
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    if any_shape:
        expected = {name: state[name].shape if name in state else shape for name, shape in expected.items()}
    tied = []
    if skeleton.config.tie_word_embeddings:
        pair = ("backbone.embeddings.weight", "lm_head.weight")
        tied.append(frozenset(pair))
        if all(name in state for name in pair) and not torch.equal(state[pair[0]], state[pair[1]]):
            raise CheckpointError(
                f"{where}: config says that lm_head.weight is tied to backbone.embeddings.weight "
                "(tie_word_embeddings / tie_embeddings true), but the checkpoint holds two that differ. "
                "Set it to false in config.json."
            )
    check_fits(state, expected, where=where, tied=tied)


def _load_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
