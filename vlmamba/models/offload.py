"""Models of which accelerate keeps parts on disk or in the host's memory (`device_map`).

accelerate fetches a layer's weights when the layer is called. A Mamba layer uses its convolution's weights without
calling the convolution, so all that is below it has to come when it is called itself. accelerate knows that
(`preload_module_classes`), but transformers does not let a model ask for it.
"""

from __future__ import annotations

from typing import Any

from vlmamba.errors import ConfigError
from vlmamba.ssm.mixer import MambaMixer

_TIED_ON_DISK = "1.15"
"""accelerate before it gives layers the weights of tied embeddings that come from disk."""


def fetch_mixers_whole(model: Any) -> None:
    """Let offloaded Mamba layers be fetched with all their parts; nothing happens to a model without such.

    Raises:
        ConfigError: Weights would be mixed up by the installed accelerate.
    """
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values() and model.config.tie_word_embeddings:
        _require_accelerate()
    for mixer in [module for module in model.modules() if isinstance(module, MambaMixer)]:
        hook = _offloading(getattr(mixer, "_hf_hook", None))
        if hook is None:
            continue
        from accelerate.hooks import (  # type: ignore[import-untyped]
            AlignDevicesHook,
            add_hook_to_module,
            remove_hook_from_module,
        )

        remove_hook_from_module(mixer, recurse=True)
        whole = AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=True,
            weights_map=hook.weights_map,
            offload_buffers=hook.offload_buffers,
            place_submodules=True,
            skip_keys=hook.skip_keys,
            tied_params_map=hook.tied_params_map,
        )
        add_hook_to_module(mixer, whole)


def _require_accelerate() -> None:
    import accelerate  # type: ignore[import-untyped]
    from packaging.version import Version  # as transformers has it

    if Version(accelerate.__version__) < Version(_TIED_ON_DISK):
        raise ConfigError(
            f"parts on disk (device_map) of a model whose head is its embeddings need accelerate {_TIED_ON_DISK} or "
            f"newer, which does not mix up their weights; installed is {accelerate.__version__}: upgrade it, or load "
            "without a disk part"
        )


def _offloading(hook: Any) -> Any:
    """The hook that fetches weights, which may stand in a sequence of hooks; None where nothing is offloaded."""
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "offload", False)), None)
