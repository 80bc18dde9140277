"""The mamba_ssm backend against stubs that compute what its kernels compute, and are as strict as they are."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from vlmamba.errors import BackendError
from vlmamba.ssm import ScanSpec, causal_conv1d, selective_scan, selective_state_update
from vlmamba.ssm.backends import mamba_ssm
from vlmamba.ssm.registry import choose_backend, get_backend, judge

NO_STATE = {"initial_state": False}


def scan_stub(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """Channels first, float32 arithmetic, dense along time; groups share B and C; no state to start from."""
    for tensor in (u, delta, B, C, *([] if z is None else [z])):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        assert tensor.dtype == u.dtype
    assert A.dtype == torch.float32
    assert u.dim() == 3
    assert B.shape == C.shape == (u.shape[0], B.shape[1], A.shape[1], u.shape[2])
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = F.softplus(step) if delta_softplus else step
    repeats = u.shape[1] // B.shape[1]
    b, c = (t.float().repeat_interleave(repeats, dim=1) for t in (B, C))
    state = torch.zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(step[:, :, t, None] * A)
        state = decay * state + (step[:, :, t] * u[:, :, t].float()).unsqueeze(-1) * b[..., t]
        outputs.append((state * c[..., t]).sum(-1))
    y = torch.stack(outputs, dim=2)
    y = y if D is None else y + D[:, None] * u.float()
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    return (y, state.detach()) if return_last_state else y


def conv_stub(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None
):
    """Tokens with equal ids are one segment; ids need channels last and a multiple of 8 of them."""
    assert initial_states is None
    assert 2 <= weight.shape[1] <= 4
    if seq_idx is not None:
        assert x.stride(1) == 1
        assert x.shape[1] % 8 == 0
        assert seq_idx.dtype == torch.int32
    if x.stride(1) == 1 and x.stride(2) != 1:
        assert x.stride(0) % 8 == 0
        assert x.stride(2) % 8 == 0
    total = torch.zeros(x.shape) if bias is None else bias.float()[:, None].expand(x.shape)
    for back in range(min(weight.shape[1], x.shape[2])):
        values = F.pad(x.float(), (back, 0))[..., : x.shape[2]]
        if seq_idx is not None and back:
            same = F.pad(seq_idx[:, back:] == seq_idx[:, :-back], (back, 0))
            values = values * same[:, None]
        total = total + values * weight[:, weight.shape[1] - 1 - back, None].float()
    return (F.silu(total) if activation == "silu" else total).to(x.dtype)


def step_stub(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """(batch, channels), or (batch, heads, channels) with one B and C for each head."""
    if x.dim() == 2:
        heads = [tensor.unsqueeze(1) for tensor in (state, x, dt)]
        y = step_stub(*heads, A[None], B[:, None], C[:, None])
        return y.squeeze(1)
    step = dt.float() if dt_bias is None else dt.float() + dt_bias
    step = F.softplus(step) if dt_softplus else step
    decay = torch.exp(step.unsqueeze(-1) * A)
    state.copy_(decay * state + (step * x.float()).unsqueeze(-1) * B.float().unsqueeze(2))
    y = (state * C.float().unsqueeze(2)).sum(-1)
    y = y if D is None else y + D * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


STUBS = {
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": scan_stub},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": step_stub},
    "causal_conv1d": {"causal_conv1d_fn": conv_stub},
}


@pytest.fixture
def install(monkeypatch):
    """Puts stub modules in the place of the packages; the backend then runs on the CPU."""

    def put(stubs):
        for name in ("mamba_ssm", *STUBS):
            monkeypatch.setitem(sys.modules, name, None)
        for name, contents in stubs.items():
            module = ModuleType(name)
            vars(module).update(contents)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(mamba_ssm, "DEVICE", "cpu")
        monkeypatch.delenv(mamba_ssm.KERNELS_VARIABLE, raising=False)
        mamba_ssm._find.cache_clear()

    yield put
    mamba_ssm._find.cache_clear()


@pytest.fixture
def stubs(install):
    install(STUBS)


@pytest.mark.usefixtures("stubs")
class TestScan:
    @pytest.mark.parametrize("length", [1, 3, 33])
    @pytest.mark.parametrize(
        ("groups", "reverse"), [(1, False), (1, True), (2, (False, True)), (4, (True, False, False, True))]
    )
    @pytest.mark.parametrize("resets", [False, True])
    def test_parity(self, scan_inputs, run_with_gradients, assert_near, length, groups, reverse, resets):
        inputs = scan_inputs(length=length, groups=groups, **NO_STATE)
        options = {"reverse": reverse}
        if resets:
            options["seq_idx"] = (torch.rand(2, length) < 0.3).cumsum(1) % 3
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        got = run_with_gradients(inputs, torch.float32, backend="mamba_ssm", **options)
        assert_near(got, want, 4e-6)

    @pytest.mark.parametrize("dropped", ["D", "z", "dt_bias"])
    @pytest.mark.parametrize("softplus", [True, False])
    def test_parity_without_an_argument(
        self, scan_inputs, run_with_gradients, assert_near, segments, dropped, softplus
    ):
        inputs = scan_inputs(length=11, **NO_STATE, **{dropped: False})
        if not softplus:
            inputs["dt"] = inputs["dt"].abs() + 3
        options = {"seq_idx": segments([5, 6], [1, 10]), "dt_softplus": softplus}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        got = run_with_gradients(inputs, torch.float32, backend="mamba_ssm", **options)
        assert_near(got, want, 4e-6)

    def test_a_slow_decay_is_forgotten_too(self, scan_inputs, run_with_gradients, assert_near, segments):
        inputs = scan_inputs(length=12, **NO_STATE)
        inputs["A"] = inputs["A"] * 1e-9
        options = {"seq_idx": segments([5, 7], [2, 10])}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="mamba_ssm", **options), want, 4e-6)

    @pytest.mark.parametrize("raw", [60.0, -14.0])
    def test_extreme_time_steps(self, scan_inputs, run_with_gradients, assert_near, segments, raw):
        inputs = scan_inputs(length=15, dt_bias=False, **NO_STATE)
        inputs["dt"] = raw + 0.1 * inputs["dt"]
        options = {"seq_idx": segments([7, 8], [15])}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="mamba_ssm", **options), want, 5e-6)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_packed_is_separate_bit_for_bit(self, scan_inputs, segments, reverse):
        inputs = {name: t.float() for name, t in scan_inputs(length=12, **NO_STATE).items()}
        ids = segments([5, 7], [5, 7])
        y = selective_scan(**inputs, seq_idx=ids, reverse=reverse, backend="mamba_ssm")
        timed = ("u", "dt", "B", "C", "z")
        for span in (slice(0, 5), slice(5, 12)):
            part = {name: t[:, span] if name in timed else t for name, t in inputs.items()}
            alone = selective_scan(**part, reverse=reverse, backend="mamba_ssm")
            assert torch.allclose(y[:, span], alone, rtol=1e-6, atol=1e-6)

    def test_nothing_leaks_between_segments(self, scan_inputs, segments):
        inputs = {n: t.float().requires_grad_() for n, t in scan_inputs(length=12, **NO_STATE).items()}
        y = selective_scan(**inputs, seq_idx=segments([5, 7], [5, 7]), backend="mamba_ssm")
        (gradient,) = torch.autograd.grad(y[:, 5:].sum(), inputs["u"])
        assert (gradient[:, :5] == 0).all()

    @pytest.mark.parametrize("resets", [False, True])
    def test_bfloat16(self, scan_inputs, run_with_gradients, assert_near, segments, resets):
        inputs = {n: t.bfloat16().double() for n, t in scan_inputs(length=20, **NO_STATE).items()}
        options = {"seq_idx": segments([9, 11], [20])} if resets else {}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        got = run_with_gradients(inputs, torch.bfloat16, backend="mamba_ssm", **options)
        assert_near(got, want, 2e-2)

    def test_last_state_and_views(self, scan_inputs, assert_near):
        inputs = {name: t.float() for name, t in scan_inputs(length=10, groups=2, **NO_STATE).items()}
        both = torch.cat([inputs["u"], inputs["z"]], dim=-1)
        views = inputs | {"u": both[..., :8], "z": both[..., 8:]}
        options = {"reverse": (False, True), "return_last_state": True}
        y, last = selective_scan(**views, **options, backend="mamba_ssm")
        want, want_last = selective_scan(**inputs, **options, backend="reference")
        assert_near(y, want, 4e-6)
        assert_near(last, want_last, 4e-6)

    @pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
    def test_empty(self, scan_inputs, batch, length):
        inputs = {n: t.float() for n, t in scan_inputs(batch=batch, length=length, **NO_STATE).items()}
        assert selective_scan(**inputs, backend="mamba_ssm").shape == (batch, length, 8)


@pytest.mark.usefixtures("stubs")
class TestConv:
    @pytest.mark.parametrize("length", [1, 3, 9])
    @pytest.mark.parametrize("channels", [8, 6])
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("history", [False, True])
    def test_parity(self, run_with_gradients, assert_near, length, channels, reverse, history):
        def noise(*shape):
            return torch.randn(*shape, dtype=torch.float64)

        inputs = {"x": noise(2, length, channels), "weight": noise(channels, 4), "bias": noise(channels)}
        if history:
            inputs["initial_state"] = noise(2, 3, channels)
        for ids in (None, (torch.rand(2, length) < 0.4).cumsum(1) % 2):
            if ids is not None and channels % 8:
                continue
            options = {"function": causal_conv1d, "reverse": reverse, "activation": "silu", "seq_idx": ids}
            options["return_state"] = True
            want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
            got = run_with_gradients(inputs, torch.float32, backend="mamba_ssm", **options)
            assert_near(got, want, 4e-6)

    def test_a_view_of_the_projection_is_not_copied(self, install):
        seen = []

        def stub(x, *arguments, **options):
            seen.append(x)
            return conv_stub(x, *arguments, **options)

        install(STUBS | {"causal_conv1d": {"causal_conv1d_fn": stub}})
        xz = torch.randn(2, 5, 32)
        causal_conv1d(xz[..., :16], torch.randn(16, 4), backend="mamba_ssm")
        assert seen[-1].data_ptr() == xz.data_ptr()
        assert seen[-1].stride() == (160, 1, 32)


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dropped", [(), ("D", "z", "dt_bias")])
def test_step(scan_inputs, assert_near, groups, dropped):
    inputs = scan_inputs(length=1, groups=groups, **dict.fromkeys(dropped, False))
    arguments = {n: t[:, 0] if n in ("u", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    states, outputs = [], []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "mamba_ssm")):
        own = {name: tensor.to(dtype).clone() for name, tensor in arguments.items()}
        states.append(own.pop("initial_state"))
        outputs.append(selective_state_update(states[-1], **own, backend=backend))
    assert_near(outputs[1].double(), outputs[0], 4e-6)
    assert_near(states[1].double(), states[0], 4e-6)


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"features": frozenset({"initial_state"})}, "its kernel cannot start from a state"),
        ({"features": frozenset({"state_at"})}, "its kernel answers no states but the last"),
        (
            {"features": frozenset({"last_state"}), "needs_grad": True},
            "its kernel has no gradient of the last state",
        ),
        (
            {"features": frozenset({"seq_idx"}), "dtype": torch.float16},
            "segments need numbers that float16 does not hold",
        ),
        ({"state_size": 512}, "its kernel has at most 256 states, not 512"),
        ({"channels": 70000}, "its kernel has at most 65535 channels, not 70000"),
        ({"dtype": torch.float64}, "it computes in float32; float64 is served by 'reference'"),
        ({"device": "mps"}, "it runs on cpu, not on mps"),
        ({"op": "conv", "state_size": 5}, "its kernel has 2 to 4 taps, not 5"),
        (
            {"op": "conv", "state_size": 4, "channels": 12, "features": frozenset({"seq_idx"})},
            "with segments its kernel needs a multiple of 8 channels, not 12",
        ),
        ({"op": "step", "needs_grad": True}, "its decode step has no gradient"),
        ({"features": frozenset({"last_state", "seq_idx", "group_reverse"})}, True),
    ],
)
def test_refusals(spec, reason):
    assert judge(get_backend("mamba_ssm"), ScanSpec(**spec)) == reason


@pytest.mark.usefixtures("stubs")
def test_a_refused_call_goes_to_the_next_backend_or_raises(scan_inputs):
    inputs = {name: tensor.float() for name, tensor in scan_inputs().items()}
    with pytest.raises(BackendError, match=r"backend 'mamba_ssm' .* its kernel cannot start from a state"):
        selective_scan(**inputs, backend="mamba_ssm")
    assert choose_backend(ScanSpec()).name == "mamba_ssm"
    assert choose_backend(ScanSpec(features=frozenset({"initial_state"}))).name in ("cpu", "torch")


class TestProbe:
    def test_without_packages(self, install):
        install({})
        verdict = mamba_ssm.available()
        assert "no kernel works (installed package: ModuleNotFoundError: " in str(verdict)
        assert "mamba_ssm.ops.selective_scan_interface" in str(verdict)

    def test_a_package_without_its_kernel(self, install):
        def broken(*_, **__):
            raise RuntimeError("selective_scan_cuda is not built")

        install(STUBS | {"mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": broken}})
        assert mamba_ssm.available() is True
        reason = "its kernel does not work here (installed package: RuntimeError: selective_scan_cuda is not built)"
        assert mamba_ssm.supports(ScanSpec()) == reason
        assert mamba_ssm.supports(ScanSpec(op="conv", state_size=4)) is True

    def test_a_kernel_that_answers_nonsense(self, install):
        install(STUBS | {"causal_conv1d": {"causal_conv1d_fn": lambda x, *_: torch.zeros_like(x)}})
        reason = mamba_ssm.supports(ScanSpec(op="conv", state_size=4))
        assert "RuntimeError: it answers 0.0 where 4.0 is right" in str(reason)

    def test_kernels_from_the_hub_only_on_request(self, install, monkeypatch):
        asked = []
        kernel = ModuleType("kernel")
        vars(kernel).update({name: f for contents in STUBS.values() for name, f in contents.items()})

        def get_kernel(repository):
            asked.append(repository)
            return kernel

        install({"kernels": {"get_kernel": get_kernel}})
        assert mamba_ssm.available() is not True
        assert asked == []
        monkeypatch.setenv("VLMAMBA_SSM_KERNELS", "1")
        mamba_ssm._find.cache_clear()
        assert mamba_ssm.available() is True
        assert mamba_ssm.supports(ScanSpec()) is True
        assert set(asked) == {"kernels-community/mamba-ssm"}

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    def test_without_a_device(self):
        assert mamba_ssm.available() == "there is no CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnTheDevice:
    @pytest.fixture(autouse=True)
    def _kernel(self):
        if (verdict := judge(get_backend("mamba_ssm"), ScanSpec(device="cuda"))) is not True:
            pytest.skip(str(verdict))

    @pytest.mark.parametrize("resets", [False, True])
    @pytest.mark.parametrize(("groups", "reverse"), [(1, False), (1, True), (2, (False, True))])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
    def test_parity(
        self, scan_inputs, run_with_gradients, assert_near, resets, groups, reverse, dtype, tolerance
    ):
        inputs = scan_inputs(length=300, channels=64, size=16, groups=groups, **NO_STATE)
        inputs = {name: tensor.to(dtype).double().cuda() for name, tensor in inputs.items()}
        options = {"reverse": reverse}
        if resets:
            options["seq_idx"] = (torch.rand(2, 300) < 0.05).cumsum(1).int().cuda()

        def run(**tensors):
            return selective_scan(**tensors, **options, backend="mamba_ssm").cpu()

        want = run_with_gradients(
            inputs, torch.float64, lambda **t: selective_scan(**t, **options, backend="reference").cpu()
        )
        got = run_with_gradients(inputs, dtype, run)
        assert_near(got, want, tolerance)
