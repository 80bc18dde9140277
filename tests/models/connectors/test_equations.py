"""Each connector equals its equation of docs/connectors.md, written out in float64, one image and one patch after
another, on a grid that is not square and with nothing of the library.

Shapes: H W grid, V = H*W patches, F vision width, D text width, C scan or query width, E inner width, N state size,
K keys, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmamba.models.connectors import CONNECTORS, build_connector

H, W, F, D = 3, 5, 12, 16
ROWS = [row * W + column for row in range(H) for column in range(W)]
COLUMNS = [row * W + column for column in range(W) for row in range(H)]
DIRECTIONS = {
    "forward": {"rows": ROWS},
    "backward": {"rows_reversed": ROWS[::-1]},
    "bsm": {"rows": ROWS, "rows_reversed": ROWS[::-1]},
    "csm": {
        "rows": ROWS,
        "rows_reversed": ROWS[::-1],
        "columns": COLUMNS,
        "columns_reversed": COLUMNS[::-1],
    },
}
Weights = dict[str, Tensor]


def part(w: Weights, name: str) -> Weights:
    """The weights of one module."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in w.items() if key.startswith(f"{name}.")}


def linear(w: Weights, x: Tensor) -> Tensor:
    return x @ w["weight"].T + w["bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def norm(w: Weights, x: Tensor) -> Tensor:
    return w["weight"] * x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5)


def mamba(w: Weights, x: Tensor) -> Tensor:
    """(L, C) -> (L, C), one token after another (Gu and Dao 2023, algorithm 2 and figure 3)."""
    A, inner, size = -torch.exp(w["A_log"]), *w["A_log"].shape
    kernel = w["conv1d.weight"].squeeze(1).T
    state, window = x.new_zeros(inner, size), x.new_zeros(kernel.shape)
    outputs = []
    for token in x:
        u, gate = (w["in_proj.weight"] @ token).split(inner)
        window = torch.stack([*window[1:], u])
        u = silu((window * kernel).sum(0) + w["conv1d.bias"])
        step, B, C = (w["x_proj.weight"] @ u).split([len(w["x_proj.weight"]) - 2 * size, size, size])
        step = torch.log(1 + torch.exp(linear(part(w, "dt_proj"), step)))
        state = torch.exp(step[:, None] * A) * state + (step * u)[:, None] * B
        outputs.append(w["out_proj.weight"] @ ((state @ C + w["D"] * u) * silu(gate)))
    return torch.stack(outputs)


def vss(w: Weights, x: Tensor, *, scan: str, share_weights: bool, merge: str) -> Tensor:
    """VSS(V): read the patches in each order, put what the layer makes of each back in the patch's place, add."""
    total = torch.zeros_like(x)
    for direction, order in DIRECTIONS[scan].items():
        layer = part(w, f"mixers.{'shared' if share_weights else direction}")
        for patch, output in zip(order, mamba(layer, x[order]), strict=True):
            total[patch] += output
    return total / len(DIRECTIONS[scan]) if merge == "mean" else total


def mlp(w: Weights, v: Tensor, *, depth: int = 2, **_: Any) -> Tensor:
    x = linear(part(w, "linear_1"), v)
    for index in range(2, depth + 1):
        x = linear(part(w, f"linear_{index}"), gelu(x))
    return x


def vss_mlp(
    w: Weights, v: Tensor, *, scan: str = "bsm", share_weights: bool = True, merge: str = "sum", **_: Any
) -> Tensor:
    """MLP(Norm(VSS(V) + V))."""
    scanned = vss(part(w, "vss"), v, scan=scan, share_weights=share_weights, merge=merge)
    return mlp(w, norm(part(w, "norm"), scanned + v))


def vss_l2(
    w: Weights, v: Tensor, *, scan: str = "bsm", share_weights: bool = True, merge: str = "sum", **_: Any
) -> Tensor:
    """V' = Linear(V); Linear(Norm(VSS(GELU(V')) + V'))."""
    x = linear(part(w, "linear_1"), v)
    scanned = vss(part(w, "vss"), gelu(x), scan=scan, share_weights=share_weights, merge=merge)
    return linear(part(w, "linear_2"), norm(part(w, "norm"), scanned + x))


def keys_of(query: int, queries: int, keys: int) -> list[int]:
    """With local attention: the keys that meet the query's share of the line, from query/Q to (query + 1)/Q of it."""
    return [k for k in range(keys) if (k + 1) * queries > query * keys and k * queries < (query + 1) * keys]


def cross_attention(w: Weights, z: Tensor, features: Tensor, *, heads: int, local: bool) -> Tensor:
    q, k, v = (linear(part(w, f"{n}_proj"), x) for n, x in (("q", z), ("k", features), ("v", features)))
    out, size = torch.empty_like(q), q.shape[1] // heads
    for i, head in product(range(len(q)), range(heads)):
        seen = keys_of(i, len(q), len(k)) if local else list(range(len(k)))
        channels = slice(head * size, (head + 1) * size)
        weights = torch.exp(k[seen, channels] @ q[i, channels] / math.sqrt(size))
        out[i, channels] = (weights / weights.sum()) @ v[seen, channels]
    return linear(part(w, "out_proj"), out)


def qmamba(
    w: Weights,
    v: Tensor,
    *,
    depth: int = 2,
    num_heads: int = 1,
    attention: str = "local",
    ffn: bool = True,
    pre: str | None = "vss-l2",
    pre_options: dict[str, Any] | None = None,
    **_: Any,
) -> Tensor:
    """Z <- Z + Mamba(Norm(Z)); Z <- Z + CA(Norm(Z), K); Z <- Z + FFN(Norm(Z)); `depth` times from the learned ones."""
    features = v if pre is None else EQUATIONS[pre](part(w, "pre"), v, **(pre_options or {}))
    features, z = norm(part(w, "feature_norm"), features), w["queries"]
    for index in range(depth):
        b = part(w, f"layers.{index}")
        z = z + mamba(part(b, "mixer"), norm(part(b, "norm"), z))
        attended = norm(part(b, "cross_norm"), z)
        z = z + cross_attention(
            part(b, "cross_attention"), attended, features, heads=num_heads, local=attention == "local"
        )
        if ffn:
            inner = gelu(linear(part(b, "ffn.0"), norm(part(b, "ffn_norm"), z)))
            z = z + linear(part(b, "ffn.2"), inner)
    return linear(part(w, "out_proj"), norm(part(w, "norm_f"), z))


EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "mlp": mlp,
    "vss-mlp": vss_mlp,
    "vss-l2": vss_l2,
    "qmamba": qmamba,
}
SCANS = [
    {"scan": scan, "share_weights": shared, "merge": merge}
    for scan, shared, merge in product(DIRECTIONS, (True, False), ("sum", "mean"))
]
SMALL = {"num_queries": 6, "depth": 2, "width": 16, "state_size": 4}
QMAMBA = [
    {"attention": attention, "ffn": ffn, "pre": pre, "num_heads": 2}
    for attention, ffn, pre in product(("local", "global"), (True, False), (None, "mlp", "vss-mlp", "vss-l2"))
]
CASES = [
    *(("mlp", options) for options in ({}, {"depth": 1}, {"depth": 3, "hidden_dim": 4 * F}, {"depth": 4})),
    *((name, options) for name in ("vss-mlp", "vss-l2") for options in ({}, {"expand": 3}, *SCANS)),
    ("vss-l2", {"width": 10, "scan": "csm"}),
    *(("qmamba", SMALL | options) for options in ({}, *QMAMBA)),
    ("qmamba", SMALL | {"pre_options": {"scan": "csm", "merge": "mean", "state_size": 4}}),
    # Fewer queries than patches, as many, more, and numbers that do not divide.
    *(("qmamba", SMALL | {"num_queries": q, "pre": None, "num_heads": 4}) for q in (1, 4, 7, 15, 20)),
    *(("qmamba", SMALL | {"depth": depth, "pre": None, "ffn_ratio": 1.5}) for depth in (1, 3)),
]


def build(name: str, **options: Any) -> Any:
    """With weights of which none is zero, one, or the same for all channels, and a norm that feels its epsilon."""
    torch.manual_seed(0)
    connector = build_connector(name, vision_dim=F, text_dim=D, grid=(H, W), **options)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return connector


def assert_equation(
    connector: Any, name: str, options: dict[str, Any], weights: Weights | None = None
) -> None:
    """To rounding, relative to the largest number."""
    images = torch.randn(2, H * W, F) * 0.3
    weights = {key: tensor.double() for key, tensor in (weights or connector.state_dict()).items()}
    wanted = torch.stack([EQUATIONS[name](weights, image.double(), **options) for image in images])
    found = connector(images).detach()
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 5e-6 * wanted.abs().max()


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
def test_connector_equals_its_equation(name: str, options: dict[str, Any]) -> None:
    assert_equation(build(name, **options), name, options)


@pytest.mark.parametrize("name", sorted(CONNECTORS.names()))
def test_gradients_are_those_of_the_equation(name: str) -> None:
    """To rounding, relative to the largest of the parameter or a hundredth of the largest of all (the bias of the keys
    has no gradient: a softmax does not feel it).
    """
    options = SMALL | {"num_heads": 2} if name == "qmamba" else {}
    connector, images = build(name, **options), torch.randn(1, H * W, F)
    weights = {n: p.detach().double().requires_grad_() for n, p in connector.named_parameters()}
    EQUATIONS[name](weights, images[0].double(), **options).square().mean().backward()
    connector(images).square().mean().backward()
    found = {n: p.grad for n, p in connector.named_parameters()}
    least = max(float(w.grad.abs().max()) for w in weights.values()) / 100
    for key, w in weights.items():
        assert (found[key] - w.grad).abs().max() <= 2e-5 * max(float(w.grad.abs().max()), least), key


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scan", list(DIRECTIONS))
def test_scan_may_change_after_training(shared: bool, scan: str) -> None:
    connector = build("vss-l2", scan="csm", share_weights=shared)
    connector.set_scan(scan)
    assert_equation(connector, "vss-l2", {"scan": scan, "share_weights": shared})
    assert connector.options == {"scan": scan, "share_weights": shared}


@pytest.mark.parametrize(
    "kept", [[0], [0, 3], [0, 2, 4], [0, 1, 3, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5, 6]]
)
def test_kept_queries_are_evenly_spaced(kept: list[int]) -> None:
    options = SMALL | {"num_queries": 7, "pre": None}
    connector = build("qmamba", **options)
    weights = {**connector.state_dict(), "queries": connector.queries.detach()[kept]}
    connector.set_num_queries(len(kept))
    assert_equation(connector, "qmamba", options, weights)
    assert connector.options == options | {"num_queries": len(kept)}
