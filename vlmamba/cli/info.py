"""``vlmamba info``: what this installation can do, and why not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

from vlmamba import __version__

PACKAGES = (
    "torch",
    "transformers",
    "open_clip_torch",
    "safetensors",
    "datasets",
    "peft",
    "accelerate",
    "deepspeed",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
    "triton",
    "tensorboard",
    "gradio",
)


def run(words: Sequence[str]) -> int:
    """Run the verb."""
    argparse.ArgumentParser(
        prog="vlmamba info",
        description="Versions, devices, scan backends, parts by name.",
        allow_abbrev=False,
    ).parse_args(words)
    import torch

    from vlmamba.models.chat import template_names
    from vlmamba.models.connectors import CONNECTORS
    from vlmamba.models.vision import encoders
    from vlmamba.models.vision.presets import PRESETS
    from vlmamba.ssm import explain
    from vlmamba.ssm.backends import cpu_library

    print(f"vlmamba {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"  {sys.executable}")
    print("\npackages")
    for name in PACKAGES:
        print(f"  {name:16} {_version(name)}")
    print("\ndevices")
    print(
        f"  cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            print(f"  cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        print("  cuda: none")
    print("\nselective scan")
    print(_indent(explain()))
    print(f"  native kernel: {cpu_library.describe()}")
    for title, names in (
        ("connectors", CONNECTORS.names()),
        ("encoder families", encoders.names()),
        ("encoders known by size", sorted(PRESETS)),
        ("chat templates", template_names()),
    ):
        print(f"\n{title}\n  {', '.join(names)}")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
