"""The hidden attention of Mamba layers: its rows add up to what the layers give, and are their gradients."""

import pytest
import torch

from vlmamba.errors import ShapeError
from vlmamba.interpret import hidden_attention
from vlmamba.interpret.held import held
from vlmamba.interpret.hidden_attention import mixer_contributions, scan_parts, vss_contributions
from vlmamba.models.connectors.vss import VSS
from vlmamba.ssm import selective_scan
from vlmamba.ssm.mixer import MambaMixer

LENGTH = 11
SEGMENTS = torch.tensor(
    [[0] * 4 + [1] * 3 + [0] * 4, [2] * LENGTH]
)  # a value that comes back is a new segment


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    layer = MambaMixer(8, state_size=4, use_bias=True).double()
    torch.nn.init.normal_(layer.D)
    torch.nn.init.uniform_(layer.dt_proj.bias, -2, 1)  # decays between none and nearly all
    return layer


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, LENGTH, 8, dtype=torch.float64)


def scan(parts, u, seq_idx):
    return selective_scan(
        u,
        parts.dt,
        parts.A,
        parts.B,
        parts.C,
        parts.D,
        dt_softplus=False,
        seq_idx=seq_idx,
        reverse=parts.reverse,
    )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seq_idx", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("chunk", [1, 1 << 24])
@torch.no_grad()
def test_contributions_and_skip_are_the_scan(mixer, reverse, seq_idx, chunk, monkeypatch):
    monkeypatch.setattr(hidden_attention, "CHUNK", chunk)
    parts = scan_parts(mixer, inputs(), seq_idx=seq_idx, reverse=reverse)
    y = scan(parts, parts.u, seq_idx)
    for target in range(LENGTH):
        total = parts.contributions(target).sum(1) + parts.skip(target)
        torch.testing.assert_close(total, y[:, target], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seq_idx", [None, SEGMENTS], ids=["whole", "packed"])
def test_weights_are_the_gradient_with_the_matrices_fixed(mixer, reverse, seq_idx):
    with torch.no_grad():
        parts = scan_parts(mixer, inputs(), seq_idx=seq_idx, reverse=reverse)
    u = parts.u.clone().requires_grad_()
    y = scan(parts, u, seq_idx)
    for target in (0, 5, LENGTH - 1):
        (slope,) = torch.autograd.grad(y[:, target].sum(), u, retain_graph=True)
        slope[:, target] -= parts.D
        torch.testing.assert_close(parts.weights(target), slope, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seq_idx", [None, SEGMENTS], ids=["whole", "packed"])
@torch.no_grad()
def test_contributions_are_the_layers_output(mixer, reverse, seq_idx):
    out = mixer(inputs(), seq_idx=seq_idx, reverse=reverse)
    parts = scan_parts(mixer, inputs(), seq_idx=seq_idx, reverse=reverse)
    for target, row in enumerate(mixer_contributions(mixer, parts, range(LENGTH))):
        torch.testing.assert_close(row.sum(1) + mixer.out_proj.bias, out[:, target], rtol=1e-9, atol=1e-11)
        assert (row.abs().sum(-1)[~parts.seen(target)] == 0).all()


@torch.no_grad()
def test_late_decays_keep_their_digits_in_float32():
    """600 tokens of large time steps: sums of time steps beyond a thousand, differences below one."""
    torch.manual_seed(2)
    layer = MambaMixer(8, state_size=4)
    torch.nn.init.uniform_(layer.dt_proj.bias, 1, 3)
    x = torch.randn(1, 600, 8)
    (row,) = mixer_contributions(layer, scan_parts(layer, x), [599])
    torch.testing.assert_close(row.sum(1), layer(x)[:, 599], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan_name", ["forward", "backward", "bsm", "csm"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("merge", ["sum", "mean"])
@torch.no_grad()
def test_contributions_are_the_2d_scans_result(scan_name, shared, merge):
    torch.manual_seed(3)
    vss = VSS(8, (3, 4), scan=scan_name, share_weights=shared, merge=merge, state_size=4).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    out = vss(x)
    for target, row in enumerate(vss_contributions(vss, x, range(12))):
        torch.testing.assert_close(row.sum(1), out[:, target], rtol=1e-9, atol=1e-11)


def test_a_target_outside_names_the_length(mixer):
    parts = scan_parts(mixer, inputs())
    with pytest.raises(ShapeError, match="target 11 is not a position of a sequence of 11 tokens"):
        next(mixer_contributions(mixer, parts, [LENGTH]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seq_idx", [None, SEGMENTS], ids=["whole", "packed"])
def test_a_held_layer_is_linear_and_its_own_sum(mixer, reverse, seq_idx):
    """Gradient x input of a held layer is its output, less what its biases add; the output is the layer's own."""
    for bias in (mixer.in_proj.bias, mixer.out_proj.bias, mixer.conv1d.bias):
        torch.nn.init.zeros_(bias)
    x = inputs().requires_grad_()
    plain = mixer(x, seq_idx=seq_idx, reverse=reverse)
    with held(mixer):
        out = mixer(x, seq_idx=seq_idx, reverse=reverse)
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-9)
    (slope,) = torch.autograd.grad(out[1, 5, 3], x)
    torch.testing.assert_close((slope * x).sum(), out[1, 5, 3], rtol=1e-6, atol=1e-9)
    assert mixer.forward.__func__ is MambaMixer.forward
