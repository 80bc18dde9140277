"""Which patches mattered for an answer token: one function a method, all with the same arguments and result.

Each gives signed relevances (n, V) of the vision tower's patch features; positive ones speak for the token. The method
`hidden-attention` measured best (docs/inspect.md).

Shapes: n images, V patches, F vision width, T visual tokens, D text width, L length, B integration steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmamba.errors import ConfigError
from vlmamba.interpret.answers import Answer, run_from_features
from vlmamba.interpret.held import held
from vlmamba.interpret.hidden_attention import mixer_contributions, scan_parts
from vlmamba.interpret.token_patches import query_attention, token_patches
from vlmamba.models.connectors.qmamba import QMambaConnector
from vlmamba.models.language import MambaLM
from vlmamba.models.modeling import VLMambaForConditionalGeneration
from vlmamba.registry import close_matches

STEPS = 16
"""Points of the integral of `gradient`; the sum over patches is then within a few per cent of what it should be."""
TOKENS = 4096
"""Tokens of how many of them run at once."""

Method = Callable[[VLMambaForConditionalGeneration, Answer, int, "int | None"], Tensor]


def explain(
    model: VLMambaForConditionalGeneration,
    answer: Answer,
    token: int,
    method: str = "hidden-attention",
    *,
    layer: int | None = None,
) -> Tensor:
    """Relevance of every patch for one answer token.

    Args:
        model: The model.
        answer: What it answered.
        token: Which answer token, from 0.
        method: A name in `METHODS`.
        layer: Layer of the language model, for `hidden-attention`; all composed when left out.

    Returns:
        (n, V), signed (weights of attention are never negative), on the CPU.

    Raises:
        ConfigError: Unknown method, token or layer out of range, or a model that the method does not fit.
    """
    if method not in METHODS:
        raise ConfigError(
            f"unknown method {method!r}.{close_matches(method, list(METHODS))} Known: {', '.join(METHODS)}."
        )
    if not 0 <= token < len(answer.tokens):
        raise ConfigError(
            f"answer token {token} is out of range: the answer has {len(answer.tokens)} tokens, 0 to "
            f"{len(answer.tokens) - 1}"
        )
    check_method(model, method, layer=layer)
    return METHODS[method](model, answer, token, layer).detach().float().cpu()


def methods_of(model: VLMambaForConditionalGeneration) -> list[str]:
    """The methods that a model allows, best first."""
    return [name for name in METHODS if _misfit(model, name) is None]


def check_method(model: VLMambaForConditionalGeneration, method: str, *, layer: int | None = None) -> None:
    """Refuse what does not fit a model.

    Raises:
        ConfigError: The model lacks what the method looks at, or the layer.
    """
    misfit = _misfit(model, method)
    if misfit is not None:
        raise ConfigError(f"method {method!r} {misfit}; this model allows: {', '.join(methods_of(model))}")
    if layer is None:
        return
    if method != "hidden-attention":
        raise ConfigError(f"method {method!r} has no layers to choose from; a layer is of 'hidden-attention'")
    number = model.config.text_config.num_hidden_layers
    if not 0 <= layer < number:
        raise ConfigError(
            f"layer {layer} is out of range: the language model has {number} layers, 0 to {number - 1}"
        )


def _misfit(model: VLMambaForConditionalGeneration, method: str) -> str | None:
    connector, language = model.multi_modal_projector, model.language_model
    if method == "cross-attention" and not isinstance(connector, QMambaConnector):
        return f"needs a Q-Mamba connector, and connector {connector.name!r} has no cross-attention"
    if method == "hidden-attention" and not isinstance(language, MambaLM):
        return f"needs a Mamba language model, and this one is {model.config.text_config.model_type!r}"
    return None


def _from_mean(features: Tensor) -> tuple[Tensor, Tensor]:
    """An image without content, every patch its mean patch, and the way from it to the image."""
    blank = features.mean(1, keepdim=True).expand_as(features)
    return blank, features - blank


def gradient(
    model: VLMambaForConditionalGeneration, answer: Answer, token: int, layer: int | None = None
) -> Tensor:
    """Gradient x input of the token's log probability, averaged on the way from a blank image to the picture.

    Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365, eq. 3): blank is the image whose patches
    are all the mean patch. Summed over the patches it is log p(picture) - log p(blank). The plain gradient at the
    picture says little where the answer is certain, since it vanishes there.
    """
    blank, way = _from_mean(answer.features)
    total = torch.zeros_like(way)
    points = ((torch.arange(STEPS, device=way.device) + 0.5) / STEPS).split(
        max(1, TOKENS // answer.input_ids.shape[1])
    )
    for chunk in points:
        on_way = (blank + chunk.view(-1, 1, 1, 1).to(way.dtype) * way).flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            _, logits = run_from_features(model, answer.input_ids, on_way, len(chunk))
            chosen = logits[:, answer.first + token - 1].log_softmax(-1)[:, answer.token_id(token)].sum()
            (slope,) = torch.autograd.grad(chosen, on_way)
        total += slope.unflatten(0, (len(chunk), -1)).sum(0)
    return (total / STEPS * way).sum(-1)


def gradient_x_input(
    model: VLMambaForConditionalGeneration, answer: Answer, token: int, layer: int | None = None
) -> Tensor:
    """Gradient of the token's log probability at the patch features, times them, summed over channels."""
    features = answer.features.clone().requires_grad_()
    with torch.enable_grad():
        _, logits = run_from_features(model, answer.input_ids, features)
        chosen = logits[0, answer.first + token - 1].log_softmax(-1)[answer.token_id(token)]
        (slope,) = torch.autograd.grad(chosen, features)
    return (slope * features).sum(-1)


def hidden_attention(
    model: VLMambaForConditionalGeneration, answer: Answer, token: int, layer: int | None = None
) -> Tensor:
    """The hidden attention of the Mamba layers, from where the token was predicted back to the patches.

    Over all layers: the token's logit above the mean logit, as a linear function of the patch features with every
    matrix of hidden attention held (`vlmamba.interpret.held`), against a blank image. Of one layer: the norm of what
    each visual token adds to that layer's output, shared out to the patches as the connector mixes them.
    """
    if layer is not None:
        shares = token_patches(model.multi_modal_projector, answer.features)
        return torch.einsum("nt,ntv->nv", _layer_norms(model, answer, token, layer), shares)
    features = answer.features.clone().requires_grad_()
    with torch.enable_grad(), held(model):
        _, logits = run_from_features(model, answer.input_ids, features)
        (slope,) = torch.autograd.grad(_above_mean(logits, answer, token), features)
    return (slope * _from_mean(answer.features)[1]).sum(-1)


def cross_attention(
    model: VLMambaForConditionalGeneration, answer: Answer, token: int, layer: int | None = None
) -> Tensor:
    """Q-Mamba's cross-attention, its queries weighted by what each visual token adds to the token's logit."""
    weights = token_relevance(model, answer, token).abs()
    connector = model.multi_modal_projector
    assert isinstance(connector, QMambaConnector)
    shares = query_attention(connector, answer.features)
    if connector.pre is not None:
        shares = shares @ token_patches(connector.pre, answer.features)
    return torch.einsum("nt,ntv->nv", weights, shares)


def token_relevance(model: VLMambaForConditionalGeneration, answer: Answer, token: int) -> Tensor:
    """Gradient x input at the connector's output, the language model held: (n, T), signed."""
    with torch.enable_grad(), held(model):
        features = answer.features.clone().requires_grad_()
        visual, logits = run_from_features(model, answer.input_ids, features)
        (slope,) = torch.autograd.grad(_above_mean(logits, answer, token), visual)
    return (slope * visual).sum(-1).detach()


def _above_mean(logits: Tensor, answer: Answer, token: int) -> Tensor:
    row = logits[0, answer.first + token - 1]
    return row[answer.token_id(token)] - row.mean()


@torch.no_grad()
def _layer_norms(model: VLMambaForConditionalGeneration, answer: Answer, token: int, layer: int) -> Tensor:
    """What each visual token adds to one layer's output at the predicting position, as a norm, (n, T)."""
    mixer = model.language_model.backbone.blocks()[layer].mixer
    inputs: list[Tensor] = []
    hook = mixer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    try:
        run_from_features(model, answer.input_ids, answer.features)
    finally:
        hook.remove()
    (row,) = mixer_contributions(mixer, scan_parts(mixer, inputs[0]), [answer.first + token - 1])
    visual = answer.input_ids[0] == model.config.image_token_id
    return row[0, visual].norm(dim=-1).unflatten(0, (len(answer.features), -1))


METHODS: dict[str, Method] = {
    "hidden-attention": hidden_attention,
    "gradient": gradient,
    "gradient-x-input": gradient_x_input,
    "cross-attention": cross_attention,
}
"""By name, best first."""
