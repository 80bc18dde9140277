"""Conversion of checkpoints between layouts; the layout of the source is told by its content, never by its name.

What can be read, and what `to` writes from it:

- a language model, original state-spaces/mamba or transformers' Mamba: "transformers" or "state-spaces";
- a Cobra (prismatic) run or `.pt` file: connector and language model, the latter in either layout;
- a LLaVA projector file: the connector;
- one of our model directories: its language model in either layout, or with "llava" its connector as
`mm_projector.bin`,
  or with "prismatic" connector and language model as a Cobra run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmamba.checkpoints.layouts import (
    CONNECTOR,
    LANGUAGE,
    PROJECTOR,
    STATE_SPACES,
    connector_from_llava,
    connector_to_llava,
    model_from_prismatic,
    model_to_prismatic,
    part_of,
)
from vlmamba.common.digests import check_folder
from vlmamba.common.files import replace_json, replaced_directory
from vlmamba.errors import CheckpointError, ConfigError, MissingFileError
from vlmamba.models.builder import CONNECTOR_CONFIG_FILE, CONNECTOR_FILE
from vlmamba.models.language.loading import read_config_dict
from vlmamba.models.language.state_spaces import (
    config_from_original,
    config_to_original,
    is_original_config,
    transformers_name,
)
from vlmamba.models.language.weights import load_state_dict_dir, load_weights_only, save_tensors
from vlmamba.registry import close_matches

CHECKPOINT = Path("checkpoints") / "latest-checkpoint.pt"
"""Of a Cobra run."""
TARGETS = ("transformers", "state-spaces", "llava", "prismatic")
LANGUAGE_DIRECTORY = "language_model"
EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        layout: Layout that was found.
        target: What was written.
        files: Names of the files in it.
        connector: Number of weights of the connector.
        language: Number of weights of the language model.
    """

    layout: str
    target: Path
    files: tuple[str, ...]
    connector: int
    language: int


@dataclass
class Parts:
    """A checkpoint in our names, whatever layout it came from.

    Attributes:
        layout: Layout that was found.
        connector: State dict of the connector.
        language: State dict of the language model.
        config: transformers config of the language model.
        directory: Where the files beside the weights (tokenizer) are.
    """

    layout: str
    connector: dict[str, torch.Tensor] = field(default_factory=dict)
    language: dict[str, torch.Tensor] = field(default_factory=dict)
    config: Any = None
    directory: Path | None = None


def convert(source: str | Path, target: str | Path, to: str = "transformers") -> Conversion:
    """Convert a checkpoint.

    Args:
        source: Directory or file.
        target: Directory to write; it appears only when everything in it is complete.
        to: "transformers", "state-spaces", "llava" or "prismatic"; see the module's description.

    Returns:
        What was found and written.

    Raises:
        ConfigError: Unknown `to`.
        MissingFileError: The source does not exist or is incomplete.
        CheckpointError: The source's layout is not known, it lacks what `to` needs, the target exists, or it
            cannot be written.
    """
    if to not in TARGETS:
        raise ConfigError(
            f"unknown layout {to!r} to convert to.{close_matches(to, list(TARGETS))} "
            f"Known: {', '.join(TARGETS)}."
        )
    target = new_directory(target)
    parts = read_parts(source)
    with replaced_directory(target) as directory:
        _write(parts, directory, to, str(source))
    files = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    return Conversion(parts.layout, target, tuple(files), len(parts.connector), len(parts.language))


def new_directory(target: str | Path) -> Path:
    """A place to write to where nothing is yet.

    Raises:
        CheckpointError: Something is.
    """
    if Path(target).exists():
        raise CheckpointError(f"{target}: exists already; choose another target, or remove it")
    return Path(target)


def read_parts(source: str | Path) -> Parts:
    """Read a checkpoint of any known layout.

    Raises:
        MissingFileError: The source does not exist or is incomplete.
        CheckpointError: Its layout is not known.
    """
    from transformers import MambaConfig

    source = Path(source)
    if source.is_file():
        return _read_file(source)
    if not source.is_dir():
        raise MissingFileError(f"{source}: no such file or directory")
    if (source / CHECKPOINT).is_file():
        return _read_file(source / CHECKPOINT)
    raw = read_config_dict(source) if (source / "config.json").is_file() else {}
    if is_original_config(raw):
        config = config_from_original(raw, str(source / "config.json"))
        state = STATE_SPACES.to_ours(load_state_dict_dir(source), where=str(source))
        return Parts("state-spaces", language=state, config=config, directory=source)
    if raw.get("model_type") == "mamba":
        state = {transformers_name(name): tensor for name, tensor in load_state_dict_dir(source).items()}
        return Parts("transformers", language=state, config=MambaConfig.from_dict(raw), directory=source)
    if raw.get("model_type") == "vlmamba":
        return _vlmamba_parts(source, raw)
    if (source / "mm_projector.bin").is_file():
        return _read_file(source / "mm_projector.bin")
    found = ", ".join(sorted(file.name for file in source.iterdir())[:12]) or "nothing"
    raise CheckpointError(
        f"{source}: no layout that is known. Looked for: config.json with 'd_model' and 'n_layer' "
        "(state-spaces), with model_type 'mamba' (transformers) or 'vlmamba' (ours); "
        f"{CHECKPOINT.as_posix()} (Cobra); mm_projector.bin (LLaVA). Found: {found}"
        + (f"; model_type is {raw['model_type']!r}" if "model_type" in raw else "")
    )


def mamba_config_of(state: Mapping[str, torch.Tensor], where: str = "checkpoint", **fields: Any) -> Any:
    """The Mamba config that the shapes of a state dict imply.

    Args:
        state: State dict in transformers' names.
        where: What it is, for messages.
        **fields: Fields that shapes do not tell.

    Raises:
        CheckpointError: It is not a Mamba language model.
    """
    from transformers import MambaConfig

    try:
        mixer = "backbone.layers.0.mixer."
        vocab_size, hidden_size = state[EMBEDDINGS].shape
        inner, state_size = state[mixer + "A_log"].shape
        told = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "num_hidden_layers": len([name for name in state if name.endswith(".mixer.A_log")]),
            "state_size": state_size,
            "conv_kernel": state[mixer + "conv1d.weight"].shape[-1],
            "time_step_rank": state[mixer + "dt_proj.weight"].shape[1],
            "expand": inner // hidden_size,
            "use_bias": mixer + "in_proj.bias" in state,
            "use_conv_bias": mixer + "conv1d.bias" in state,
            "tie_word_embeddings": HEAD not in state or torch.equal(state[HEAD], state[EMBEDDINGS]),
        }
    except KeyError as error:
        raise CheckpointError(f"{where}: not a Mamba language model: {error.args[0]} is missing") from error
    return MambaConfig(**(told | fields))


def _read_file(file: Path) -> Parts:
    content = load_weights_only(file)
    model = content.get("model") if isinstance(content, Mapping) else None
    if isinstance(model, Mapping) and "projector" in model:
        state = model_from_prismatic(model, where=str(file))
        language = part_of(state, LANGUAGE)
        config = mamba_config_of(language, str(file)) if language else None
        return Parts("prismatic", part_of(state, CONNECTOR), language, config)
    if isinstance(content, Mapping) and any(PROJECTOR in str(name) for name in content):
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        return Parts("llava", connector=connector_from_llava(tensors, where=str(file)))
    names = list(content)[:8] if isinstance(content, Mapping) else [type(content).__name__]
    found = ", ".join(map(str, names))
    raise CheckpointError(
        f"{file}: no layout that is known. Looked for: 'model' with 'projector' in it (Cobra), names with "
        f"{PROJECTOR!r} (LLaVA). Found: {found or 'nothing'}. A language model is converted by its "
        "directory, which holds its config.json."
    )


def _vlmamba_parts(source: Path, raw: Mapping[str, Any]) -> Parts:
    from transformers import MambaConfig

    check_folder(source)
    state = load_state_dict_dir(source)
    text = dict(raw.get("text_config") or {})
    language = part_of(state, LANGUAGE)
    if text.get("model_type") != "mamba":
        raise CheckpointError(
            f"{source}: its language model is {text.get('model_type')!r}; only Mamba's is converted. "
            "transformers reads the other kinds directly."
        )
    connector = part_of(state, CONNECTOR)
    return Parts("vlmamba", connector, language, MambaConfig.from_dict(text), source)


def _write(parts: Parts, directory: Path, to: str, where: str) -> None:
    if to in ("llava", "prismatic"):
        if not parts.connector:
            raise CheckpointError(f"{where}: has no connector ({parts.layout} layout), which {to!r} needs")
        if to == "llava":
            save_tensors(connector_to_llava(parts.connector), directory / "mm_projector.bin")
            return
        _write_prismatic(parts, directory)
        return
    if parts.connector and parts.layout != "vlmamba":
        save_tensors(parts.connector, directory / CONNECTOR_FILE)
        replace_json(directory / CONNECTOR_CONFIG_FILE, _describe_mlp(parts.connector), sort_keys=True)
        if parts.language:
            _write_language(parts, directory / LANGUAGE_DIRECTORY, to, where)
        return
    _write_language(parts, directory, to, where)


def _describe_mlp(connector: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Config of the MLP connector that LLaVA's and Cobra's projectors are, read off its shapes."""
    depth = sum(name.endswith(".weight") for name in connector)
    hidden, vision_dim = connector["linear_1.weight"].shape
    text_dim = connector[f"linear_{depth}.weight"].shape[0]
    options = {"depth": depth} | ({"hidden_dim": hidden} if depth > 1 and hidden != text_dim else {})
    return {"name": "mlp", "options": options, "vision_dim": vision_dim, "text_dim": text_dim}


def _write_language(parts: Parts, directory: Path, to: str, where: str) -> None:
    state, config = dict(parts.language), parts.config
    if config.tie_word_embeddings:
        if HEAD in state and EMBEDDINGS in state and not torch.equal(state[HEAD], state[EMBEDDINGS]):
            raise CheckpointError(
                f"{where}: its config ties {HEAD} to {EMBEDDINGS}, but it holds two that differ; "
                "set tie_word_embeddings (tie_embeddings) to false in its config.json"
            )
        state.setdefault(EMBEDDINGS, state.get(HEAD, torch.empty(0)))
        state.pop(HEAD, None)
    directory.mkdir(parents=True, exist_ok=True)
    if to == "transformers":
        described = config.to_dict() | {"architectures": ["MambaForCausalLM"]}
        replace_json(directory / "config.json", described, sort_keys=True)
        save_tensors(state, directory / "model.safetensors")
    else:  # mamba_ssm reads pytorch_model.bin, and wants the head in it, tied or not
        state.setdefault(HEAD, state[EMBEDDINGS])
        replace_json(directory / "config.json", config_to_original(config), sort_keys=True)
        save_tensors(STATE_SPACES.to_theirs(state, where=where), directory / "pytorch_model.bin")
    for name in CARRIED:
        if parts.directory is not None and (parts.directory / name).is_file():
            shutil.copyfile(parts.directory / name, directory / name)


def _write_prismatic(parts: Parts, directory: Path) -> None:
    language = dict(parts.language)
    if language:
        language.setdefault(HEAD, language[EMBEDDINGS])
    state = {f"{CONNECTOR}{name}": tensor for name, tensor in parts.connector.items()}
    state |= {f"{LANGUAGE}{name}": tensor for name, tensor in language.items()}
    (directory / CHECKPOINT).parent.mkdir(parents=True)
    torch.save({"model": model_to_prismatic(state)}, directory / CHECKPOINT)
