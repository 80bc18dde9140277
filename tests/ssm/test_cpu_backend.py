"""The native CPU backend: its sizes, accuracy and determinism (the shared tests cover the rest)."""

from __future__ import annotations

import shutil

import pytest
import torch

from vlmamba.ssm import causal_conv1d, selective_scan, selective_state_update
from vlmamba.ssm.backends import cpu_build, cpu_step

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in cpu_build.COMPILERS), reason="there is no C++ compiler"
)


@needs_compiler
class TestSizes:
    @pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
    @pytest.mark.parametrize(("length", "channels"), [(1, 40), (3, 5), (33, 17), (64, 34), (130, 20)])
    def test_parity(self, scan_inputs, assert_as_exact_as_float32, size, length, channels):
        inputs = scan_inputs(batch=2, length=length, channels=channels, size=size)
        inputs["A"] = -torch.rand(channels, size, dtype=torch.float64) * 4
        ids, at = (torch.rand(2, length) < 0.1).cumsum(1), torch.randint(0, length, (2, 4))
        assert_as_exact_as_float32(inputs, "cpu", seq_idx=ids, reverse=length % 2 == 0, state_at=at)

    def test_groups_that_no_register_fits(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(batch=3, length=70, channels=57, size=6, groups=3)
        options = {"reverse": (True, False, True), "return_last_state": True}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu", **options), want, 4e-6)

    def test_many_blocks_share_a_unit(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(batch=4, length=40, channels=200, size=5)
        want = run_with_gradients(inputs, torch.float64, backend="reference")
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu"), want, 4e-6)

    def test_a_growing_state_is_exact_too(self, scan_inputs, run_with_gradients, assert_near):
        inputs = scan_inputs(length=12)
        inputs["A"] = -inputs["A"] * 0.3
        want = run_with_gradients(inputs, torch.float64, backend="reference")
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu"), want, 4e-6)


GRID = [
    (length, channels, size, groups)
    for length in (1, 3, 33, 64, 130)
    for channels in (8, 40, 64)
    for size in (8, 16)
    for groups in (1, 2, 4)
]


@needs_compiler
class TestAccuracy:
    """Relative errors, to the largest value of each tensor, against float64."""

    def check(self, inputs, run_with_gradients, assert_near, dtype, tolerance, **options):
        inputs = {name: tensor.to(dtype).double() for name, tensor in inputs.items()}
        options["return_last_state"] = True
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        got = run_with_gradients(inputs, dtype, backend="cpu", **options)
        for name in want:
            assert_near(got[name], want[name], tolerance.get(name, tolerance["rest"]))

    @pytest.mark.parametrize(("length", "channels", "size", "groups"), GRID[::7])
    def test_single_precision(
        self, scan_inputs, run_with_gradients, assert_near, length, channels, size, groups
    ):
        inputs = scan_inputs(length=length, channels=channels, size=size, groups=groups)
        options = {"seq_idx": (torch.rand(2, length) < 0.05).cumsum(1), "reverse": (True,) * groups}
        self.check(inputs, run_with_gradients, assert_near, torch.float32, {"rest": 4e-6})
        self.check(inputs, run_with_gradients, assert_near, torch.float32, {"rest": 4e-6}, **options)

    @pytest.mark.parametrize(("length", "channels", "size", "groups"), GRID[3::11])
    def test_half_precision(
        self, scan_inputs, run_with_gradients, assert_near, length, channels, size, groups
    ):
        inputs = scan_inputs(length=length, channels=channels, size=size, groups=groups)
        self.check(inputs, run_with_gradients, assert_near, torch.bfloat16, {"rest": 2e-2})

    @pytest.mark.slow
    def test_whole_grid(self, scan_inputs, run_with_gradients, assert_near):
        for length, channels, size, groups in GRID:
            inputs = scan_inputs(length=length, channels=channels, size=size, groups=groups)
            self.check(inputs, run_with_gradients, assert_near, torch.float32, {"rest": 4e-6})
            self.check(inputs, run_with_gradients, assert_near, torch.bfloat16, {"rest": 2e-2})

    def test_rates_and_times_without_bounds(self):
        """What decides nothing any more does not turn into NaN: decays are 0, 1 or infinite."""
        rates = torch.tensor([[-float("inf"), -1e30, -1e-30, 0.0, 1e30, -1.0]])
        ones, start = torch.ones(1, 1, 1), torch.ones(1, 1, 6)
        for time, last in ((1.0, 0.36788), (1e10, 0.0), (1e-9, 1.0)):
            arguments = (0 * ones, time * ones, rates, torch.ones(1, 1, 6), torch.ones(1, 1, 6))
            _, state = selective_scan(
                *arguments, initial_state=start, dt_softplus=False, return_last_state=True, backend="cpu"
            )
            want = torch.tensor([0.0, 0.0, 1.0, 1.0, float("inf"), last])
            assert torch.allclose(state[0, 0], want, atol=1e-4), time
            u, dt, A, B, C = arguments
            stepped = start.clone()
            selective_state_update(
                stepped, u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], dt_softplus=False, backend="cpu"
            )
            assert torch.allclose(stepped[0, 0], want, atol=1e-4), time


@needs_compiler
class TestConvolution:
    @pytest.mark.parametrize(
        ("length", "channels", "taps", "batch"), [(65, 140, 4, 2), (130, 33, 3, 1), (1, 5, 4, 3)]
    )
    @pytest.mark.parametrize("reverse", [False, True])
    def test_more_tokens_and_channels_than_a_tile(
        self, run_with_gradients, assert_near, length, channels, taps, batch, reverse
    ):
        inputs = {
            "x": torch.randn(batch, length, channels),
            "weight": torch.randn(channels, taps),
            "bias": torch.randn(channels),
            "initial_state": torch.randn(batch, taps - 1, channels),
        }
        options = {"seq_idx": (torch.rand(batch, length) < 0.1).cumsum(1), "reverse": reverse}
        options |= {"activation": "silu", "function": causal_conv1d}
        want = run_with_gradients(inputs, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(inputs, torch.float32, backend="cpu", **options), want, 4e-6)
        half = {name: tensor.bfloat16() for name, tensor in inputs.items()}
        want = run_with_gradients(half, torch.float64, backend="reference", **options)
        assert_near(run_with_gradients(half, torch.bfloat16, backend="cpu", **options), want, 2e-2)

    def test_views_without_copies_of_rows(self, assert_near):
        both = torch.randn(2, 70, 48)
        for x in (both[..., :24], both[:, ::2, 24:], both.transpose(1, 2)[:, :, :24]):
            weight = torch.randn(x.shape[2], 4)
            want = causal_conv1d(x.contiguous(), weight, backend="cpu")
            assert torch.equal(causal_conv1d(x, weight, backend="cpu"), want)

    def test_wide_kernels_are_served(self, assert_near):
        x, weight = torch.randn(1, 30, 4), torch.randn(4, 20)
        assert_near(
            causal_conv1d(x, weight, backend="cpu"), causal_conv1d(x, weight, backend="reference"), 4e-6
        )

    @pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)])
    def test_empty(self, shape):
        x, weight = torch.randn(shape).requires_grad_(), torch.randn(4, 4).requires_grad_()
        y = causal_conv1d(x, weight, backend="cpu")
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert (weight.grad == 0).all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_numbers_stay_in_their_segment(self, segments, bad):
        x, weight = torch.randn(1, 20, 3), torch.rand(3, 4) + 1
        x[0, 8, 1] = bad
        y = causal_conv1d(
            x.requires_grad_(), weight, activation="silu", seq_idx=segments([9, 11]), backend="cpu"
        )
        assert not y[0, 8, 1].isfinite()
        assert y[0, 9:].isfinite().all()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient[0, 9:].isfinite().all()


@needs_compiler
class TestStep:
    @pytest.mark.parametrize(
        ("batch", "channels", "size", "groups"), [(1, 40, 16, 1), (3, 18, 5, 2), (2, 33, 24, 3)]
    )
    def test_parity(self, assert_near, batch, channels, size, groups):
        both = torch.randn(batch, 2 * channels)
        matrices = torch.randn(batch, 3 + 2 * groups * size)
        arguments = {
            "u": torch.randn(batch, channels),
            "dt": torch.randn(batch, channels),
            "A": -torch.rand(channels, size),
            "B": matrices[:, 3 : 3 + groups * size].unflatten(1, (groups, size)),
            "C": matrices[:, 3 + groups * size :].unflatten(1, (groups, size)),
            "D": torch.randn(channels),
            "z": both[:, channels:],
            "dt_bias": torch.randn(channels),
        }
        start = torch.randn(batch, channels, size)
        for kind in (torch.float32, torch.bfloat16):
            timed = {n: t.to(kind) if n in ("u", "dt", "B", "C", "z") else t for n, t in arguments.items()}
            want_state, got_state = start.clone(), start.clone()
            wanted = {name: tensor.double() for name, tensor in timed.items()}
            want = selective_state_update(want_state, **wanted, backend="reference")
            got = selective_state_update(got_state, **timed, backend="cpu")
            assert_near(got_state, want_state, 4e-6)
            assert_near(got.double(), want, 4e-6 if kind == torch.float32 else 2e-2)

    def test_a_state_in_any_layout_is_overwritten(self, assert_near):
        u, matrix = torch.randn(2, 2, 6), torch.randn(2, 2, 5)
        A, whole = -torch.rand(6, 5), torch.randn(2, 5, 6)
        views = whole.transpose(1, 2), whole.transpose(1, 2).contiguous()
        first, second = (selective_state_update(view, *u, A, *matrix, backend="cpu") for view in views)
        assert torch.equal(first, second)
        assert torch.equal(*views)

    def test_steps_are_equal_for_any_number_of_threads(self, monkeypatch):
        monkeypatch.setattr(cpu_step, "NUMBERS_OF_A_THREAD", 64)
        u, z, matrix = torch.randn(8, 40), torch.randn(8, 40), torch.randn(8, 16)
        A, start = -torch.rand(40, 16), torch.randn(8, 40, 16)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 7):
                torch.set_num_threads(threads)
                state = start.clone()
                y = selective_state_update(state, u, z, A, matrix, matrix, z=z, backend="cpu")
                results.append((y, state))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for found in results for a, b in zip(found, results[0], strict=True))

    def test_no_rows(self):
        state = torch.zeros(0, 6, 5)
        u, matrix = torch.randn(0, 6), torch.randn(0, 5)
        assert selective_state_update(
            state, u, u, -torch.rand(6, 5), matrix, matrix, backend="cpu"
        ).shape == (0, 6)

    def test_bad_numbers_stay_in_their_channel(self):
        u, matrix, state = torch.randn(1, 6), torch.randn(1, 5), torch.zeros(1, 6, 5)
        u[0, 2] = float("nan")
        y = selective_state_update(
            state, u, torch.randn(1, 6), -torch.rand(6, 5), matrix, matrix, backend="cpu"
        )
        assert y.isnan().nonzero().tolist() == [[0, 2]]
        assert state.isnan().any(dim=2).nonzero().tolist() == [[0, 2]]
