"""Progress bars: one look, and one switch for all of them (``VLMAMBA_PROGRESS=0``)."""

from __future__ import annotations

import os
import sys
from typing import Any


def progress_bar(
    of: Any, desc: str, unit: str, *, initial: int = 0, enabled: bool = True, smoothing: float = 0.3
) -> Any:
    """A tqdm bar with the time left; plain lines now and then where there is no terminal.

    Args:
        of: What to go through, or how many there are.
        desc, unit, initial, smoothing: As in tqdm.
        enabled: Whether this process shows any.
    """
    from tqdm.auto import tqdm

    interactive = sys.stderr.isatty()
    return tqdm(
        None if isinstance(of, int) else of,
        total=of if isinstance(of, int) else None,
        desc=desc,
        unit=unit,
        initial=initial,
        disable=not enabled or not shown(),
        dynamic_ncols=interactive,
        mininterval=0.5 if interactive else 30.0,
        smoothing=smoothing,
    )


def shown() -> bool:
    """Whether the user wants any."""
    return os.environ.get("VLMAMBA_PROGRESS") != "0"


def silence_others() -> None:
    """Let transformers and huggingface_hub follow the same switch; before they are imported."""
    if not shown():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
