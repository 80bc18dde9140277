"""The errors vlmamba raises for its users.

Every class derives from `VLMambaError` and from the builtin that fits, so that callers may catch either. A message
says what is wrong (with both values), where (dotted path, sample id, file:line), and what to do. Programmer errors
stay plain `AssertionError`s.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class VLMambaError(Exception):
    """Base of all errors meant for users; the command line prints these without a traceback."""


class ConfigError(VLMambaError, ValueError):
    """A setting, name or override is wrong."""


class DataError(VLMambaError, ValueError):
    """An annotation row or a data file is wrong."""


class ImageError(DataError):
    """An image is missing, unreadable, too large, or outside its root."""


class CheckpointError(VLMambaError, ValueError):
    """A checkpoint is incomplete, of another layout, or does not fit the model."""


class WriteError(CheckpointError, OSError):
    """The system refused a write (a full disk, mostly); what was there before is unharmed."""


class ShapeError(VLMambaError, ValueError):
    """Tensors do not fit together."""


class BackendError(VLMambaError, ValueError):
    """A kernel backend is unknown or cannot serve a call."""


class MissingFileError(VLMambaError, FileNotFoundError):
    """A file or folder that the run needs is not there."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(VLMambaError, ImportError):
    """An optional package is not installed."""


class TrainingError(VLMambaError, RuntimeError):
    """A run cannot go on (non-finite loss, no supervised token, failed save)."""


def require(module: str, *, extra: str | None, feature: str) -> ModuleType:
    """Import an optional package or say how to install it.

    Args:
        module: Dotted name of the module to import.
        extra: The extra of vlmamba that brings it; None where none does.
        feature: What needs it, in words for the user.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module (or its top-level package) is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not module.startswith(error.name.split(".")[0]):
            raise
        raise MissingDependencyError(
            f"{feature} needs the package {module.split('.')[0]!r}, which is not installed. "
            + (
                f"Install it with: pip install 'vlmamba[{extra}]'"
                if extra
                else "Install it as its own pages say."
            )
        ) from error
