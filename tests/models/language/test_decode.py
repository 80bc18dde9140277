"""The one-step path: the same tokens as the modules give, fixed memory, hooks and changed weights, graphs."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from vlmamba.errors import BackendError, ConfigError
from vlmamba.models.language import decode
from vlmamba.models.language.cache import MambaCache
from vlmamba.models.language.mamba import MambaLM
from vlmamba.ssm import use_backend
from vlmamba.testing import tiny_model

LENGTHS = (4, 11, 7)


def generate(model, ids, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


def left_padded(ids):
    out, mask = torch.full_like(ids, 9), torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        out[row, -length:], mask[row, -length:] = ids[row, :length], 1
    return out, mask


@pytest.fixture
def through_modules(monkeypatch):
    """Run something with every decoding step through the modules."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(MambaCache, "decode", lambda self, backbone, hidden: None)
            return function()

    return run


@pytest.fixture
def recorder(monkeypatch):
    """Graphs without a GPU: a "recording" replays by running again. Returns the list of recordings."""
    made = []

    def capture(run):
        run()
        run()  # as the warm-up does
        made.append(run)
        return run

    def no_device_check(backbone, device):
        if not decode.steppable(backbone):
            raise ConfigError("hooks")

    monkeypatch.setattr(decode, "cuda_capture", capture)
    monkeypatch.setattr(decode, "check_graphs", no_device_check)
    return made


@pytest.mark.parametrize("beams", [1, 3])
def test_greedy_and_beams_equal_the_modules(lm, ids, through_modules, beams):
    batch, mask = left_padded(ids)
    options = {"attention_mask": mask, "num_beams": beams}
    assert torch.equal(
        generate(lm, batch, **options), through_modules(lambda: generate(lm, batch, **options))
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True, "conv_kernel": 3},
        {"use_conv_bias": False, "hidden_act": "gelu", "residual_in_fp32": False},
        {"expand": 1, "time_step_rank": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_logits_equal_the_modules(config, ids, through_modules, changes, dtype):
    torch.manual_seed(2)
    model = MambaLM(config(**changes)).eval().to(dtype)

    def run():
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        return [*logits, *(t for layer in cache.state for t in (layer.conv, layer.ssm))]

    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip(run(), through_modules(run), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_states_stay_where_they_are(lm, ids):
    with torch.no_grad():
        cache = lm(ids, use_cache=True).past_key_values
        places = [tensor.data_ptr() for layer in cache.state for tensor in (layer.conv, layer.ssm)]
        for step in range(3):
            lm(ids[:, step : step + 1], past_key_values=cache)
    assert places == [tensor.data_ptr() for layer in cache.state for tensor in (layer.conv, layer.ssm)]
    assert cache.get_seq_length() == 14


def test_gradients_go_through_the_modules(lm, ids):
    cache = lm(ids, use_cache=True).past_key_values
    lm(ids[:, :1], past_key_values=cache).logits.sum().backward()
    assert lm.backbone.layers[0].mixer.A_log.grad.abs().sum() > 0


def test_hooked_blocks_are_called(lm, ids):
    seen = []
    handle = lm.backbone.layers[1].mixer.register_forward_hook(lambda *_: seen.append(1))
    expected = generate(lm, ids)
    assert len(seen) == 12
    handle.remove()
    assert torch.equal(generate(lm, ids), expected)


def test_hooked_projections_are_called(lm, ids):
    """Projections are modules in the one-step path as well: adapters and quantised layers take effect."""
    seen = []
    lm.backbone.layers[1].mixer.x_proj.register_forward_hook(lambda *_: seen.append(1))
    generate(lm, ids)
    assert len(seen) == 12


def test_weights_that_change_between_steps(lm, ids, through_modules):
    def run():
        model = copy.deepcopy(lm)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache)
            for block in model.backbone.layers:
                block.mixer.A_log.add_(1.0)
                block.mixer.conv1d.weight.mul_(2.0)
            return model(ids[:, :1], past_key_values=cache).logits

    torch.testing.assert_close(run(), through_modules(run), atol=1e-5, rtol=1e-5)


def test_a_backend_asked_for_between_steps(lm, ids):
    with torch.no_grad():
        cache = lm(ids, use_cache=True).past_key_values
        step = lm(ids[:, :1], past_key_values=cache.clone()).logits
        lm(ids[:, :1], past_key_values=(other := cache.clone()))
        with use_backend("reference"):
            torch.testing.assert_close(lm(ids[:, :1], past_key_values=cache).logits, step)
            lm(ids[:, :1], past_key_values=other)
            names = {layer.step.__module__ for layer in other._step.layers}
    assert names == {"vlmamba.ssm.backends.torch_step"}
    with pytest.raises(BackendError, match="unknown state-space backend 'nobody'"), use_backend("nobody"):
        lm(ids[:, :1], past_key_values=cache)


def test_graphs_answer_the_same_tokens(lm, ids, recorder):
    batch, mask = left_padded(ids)
    for beams in (1, 3):
        options = {"attention_mask": mask, "num_beams": beams}
        assert torch.equal(generate(lm, batch, cuda_graphs=True, **options), generate(lm, batch, **options))
    assert len(recorder) == 2  # one for 3 rows, one for 9


def test_graphs_are_recorded_once_and_follow_the_weights(lm, ids, recorder):
    for _ in range(3):
        generate(lm, ids, cuda_graphs=True)
    with torch.no_grad():
        lm.backbone.layers[0].mixer.A_log.add_(0.7)
        lm.backbone.layers[0].mixer.in_proj.weight.mul_(-1)
    with torch.inference_mode():
        assert torch.equal(generate(lm, ids, cuda_graphs=True), generate(lm, ids))
    assert torch.equal(generate(lm, ids, cuda_graphs=True), generate(lm, ids))
    assert len(recorder) == 1


def test_graphs_of_weights_that_moved_are_forgotten(lm, ids, recorder):
    generate(lm, ids, cuda_graphs=True)
    lm.to(torch.float64).to(torch.float32)
    assert torch.equal(generate(lm, ids, cuda_graphs=True), generate(lm, ids))
    assert len(recorder) == 2
    assert len(lm.backbone.graphs._free) == 1


def test_two_caches_have_graphs_of_their_own(lm, ids, recorder):
    with torch.no_grad():
        caches = [MambaCache(cuda_graphs=True) for _ in range(2)]
        prompts = ids, ids.flip(1)
        for cache, prompt in zip(caches, prompts, strict=True):
            lm(prompt, past_key_values=cache)
        for token in range(3):  # in turns
            for cache, prompt in zip(caches, prompts, strict=True):
                got = lm(ids[:, token : token + 1], past_key_values=cache).logits
                text = torch.cat([prompt, ids[:, : token + 1]], dim=1)
                torch.testing.assert_close(got[:, -1], lm(text).logits[:, -1], atol=1e-5, rtol=1e-5)
    assert len(recorder) == 2
    del cache, caches
    gc.collect()
    assert [len(free) for free in lm.backbone.graphs._free.values()] == [2]


def test_rows_that_change_get_another_graph(lm, ids, recorder):
    with torch.no_grad():
        cache = MambaCache(cuda_graphs=True)
        lm(ids, past_key_values=cache)
        lm(ids[:, :1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        doubled = lm(ids[:, :1].repeat_interleave(2, 0), past_key_values=cache).logits
    text = torch.cat([ids, ids[:, :1], ids[:, :1]], dim=1)
    expected = lm(text).logits[:, -1:].repeat_interleave(2, 0)
    torch.testing.assert_close(doubled, expected, atol=1e-5, rtol=1e-5)
    del cache
    assert torch.equal(generate(lm, ids, cuda_graphs=True), generate(lm, ids))


def test_a_model_with_graphs_can_be_copied(lm, ids, recorder):
    generate(lm, ids, cuda_graphs=True)
    twin = copy.deepcopy(lm)
    assert twin.backbone.graphs._free == {}
    assert torch.equal(generate(twin, ids, cuda_graphs=True), generate(lm, ids))


def test_the_whole_model_decodes_with_graphs(recorder):
    model, processor = tiny_model("vss-l2")
    ids = torch.tensor([[5, 6, *[processor.image_token_id] * 16, 7, 8]])
    pixels = torch.randn(1, 3, 16, 16)
    plain = generate(model, ids, pixel_values=pixels)
    assert torch.equal(generate(model, ids, pixel_values=pixels, cuda_graphs=True), plain)
    assert len(recorder) == 1


def test_where_graphs_cannot_be(lm, ids):
    with pytest.raises(ConfigError, match="needs the model on a CUDA device, but it is on cpu"):
        generate(lm, ids, cuda_graphs=True)
    with pytest.raises(ConfigError, match="records steps on a cache; leave use_cache on"):
        generate(lm, ids, cuda_graphs=True, use_cache=False)
    llama, _ = tiny_model(language="llama")
    with pytest.raises(ConfigError, match=r"is for Mamba.*llama is decoded by transformers"):
        generate(llama, ids, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu(lm, ids, dtype):
    lm, ids = lm.to("cuda", dtype), ids.cuda()
    expected = generate(lm, ids, max_new_tokens=64)
    for _ in range(2):
        assert torch.equal(generate(lm, ids, max_new_tokens=64, cuda_graphs=True), expected)
