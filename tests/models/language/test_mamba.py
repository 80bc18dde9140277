"""MambaLM against transformers' MambaForCausalLM, and its own laws: batch == single, packed == separate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaForCausalLM

from vlmamba.errors import ShapeError
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.language.sizes import SIZES, mamba_config, parameter_count

LENGTHS = (4, 11, 7)


def padded(ids: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `ids` cut to LENGTHS and padded with a token that is not neutral."""
    out = torch.full_like(ids, 9)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
        out[row, where] = ids[row, :length]
        mask[row, where] = 1
    return out, mask


def close(a: torch.Tensor, b: torch.Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def test_logits_and_hidden_states_equal_transformers(pair, ids):
    ours, theirs = pair
    a, b = ours(ids, output_hidden_states=True), theirs(ids, output_hidden_states=True)
    close(a.logits, b.logits)
    assert len(a.hidden_states) == len(b.hidden_states)
    for mine, other in zip(a.hidden_states, b.hidden_states, strict=True):
        close(mine, other)


def test_loss_and_gradients_equal_transformers(pair, ids):
    ours, theirs = (model.train() for model in pair)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[2] = -100
    a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
    close(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, others[name].grad)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_bias": True, "conv_kernel": 3},
        {"use_conv_bias": False, "hidden_act": "gelu", "residual_in_fp32": False},
        {"expand": 1, "time_step_rank": 3, "layer_norm_epsilon": 1e-2},
    ],
)
def test_every_config_option_equals_transformers(config, ids, changes):
    torch.manual_seed(2)
    theirs = MambaForCausalLM(config(**changes)).eval()
    ours = MambaLM(config(**changes)).eval()
    ours.load_state_dict(theirs.state_dict())
    close(ours(ids).logits, theirs(ids).logits)


def test_fp32_residual_stays_fp32_in_a_bf16_model(lm, ids):
    lm = lm.bfloat16()
    hidden = lm(ids, output_hidden_states=True).hidden_states
    assert hidden[0].dtype == torch.float32
    assert lm(ids).logits.dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(lm, ids, side):
    batch, mask = padded(ids, side)
    with torch.no_grad():
        logits = lm(batch, attention_mask=mask).logits
        for row, length in enumerate(LENGTHS):
            close(logits[row][mask[row] == 1], lm(ids[row : row + 1, :length]).logits[0], 1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_gradient(lm, ids, side):
    batch, mask = padded(ids, side)
    embeds = lm.get_input_embeddings()(batch).detach().requires_grad_()
    labels = batch.masked_fill(mask == 0, 5)  # labels at padding must not count either
    loss = lm(inputs_embeds=embeds, attention_mask=mask, labels=labels, logits_to_keep=None).loss
    loss.backward()
    assert (embeds.grad[mask == 0] == 0).all()
    singles = [
        lm(ids[row : row + 1, :n], labels=ids[row : row + 1, :n]).loss * (n - 1)
        for row, n in enumerate(LENGTHS)
    ]
    close(loss, torch.stack(singles).sum() / (sum(LENGTHS) - 3))


def test_packed_equals_separate(lm, ids):
    row = torch.cat([ids[row, :n] for row, n in enumerate(LENGTHS)])[None]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()
    packed = lm(row, seq_idx=seq_idx, labels=row)
    singles = [lm(ids[i : i + 1, :n], labels=ids[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]
    close(packed.logits[0], torch.cat([single.logits[0] for single in singles]), 1e-6)
    expected = sum(single.loss * (n - 1) for single, n in zip(singles, LENGTHS, strict=True))
    close(packed.loss, expected / (sum(LENGTHS) - 3))


def test_packed_and_padded_on_either_side(lm, ids):
    packed = torch.cat([ids[0, :4], ids[1, :5]])
    seq_idx = torch.tensor([0] * 4 + [1] * 5)
    pads = torch.full((2,), 9)
    rows = torch.stack([torch.cat([pads, packed]), torch.cat([packed, pads])])
    segments = torch.stack([F.pad(seq_idx, (2, 0), value=-1), F.pad(seq_idx, (0, 2), value=-1)]).int()
    mask = (segments >= 0).long()
    logits = lm(rows, seq_idx=segments, attention_mask=mask).logits
    expected = torch.cat([lm(ids[0:1, :4]).logits[0], lm(ids[1:2, :5]).logits[0]])
    close(logits[0][mask[0] == 1], expected, 1e-6)
    close(logits[1][mask[1] == 1], expected, 1e-6)


def test_labels_through_label_rows_equal_full_logits(lm, ids):
    labels = ids.clone()
    labels[:, ::3] = -100
    full = lm(ids, labels=labels)
    rows = lm(ids, labels=labels, logits_to_keep=None)
    assert rows.logits is None
    close(rows.loss, full.loss, 1e-7)
    close(lm(ids, labels=labels, num_items=5).loss * 5, full.loss * (labels[:, 1:] != -100).sum())


def test_the_head_sees_label_rows_only(lm, ids):
    labels = torch.full_like(ids, -100)
    labels[1, 3:6] = ids[1, 3:6]
    seen = []
    handle = lm.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    lm(ids, labels=labels, logits_to_keep=None)
    handle.remove()
    assert seen == [(3, 16)]


def test_no_supervised_token_gives_zero_loss_with_a_gradient(lm, ids):
    for keep in (0, None):
        lm.zero_grad()
        loss = lm(ids, labels=torch.full_like(ids, -100), logits_to_keep=keep).loss
        loss.backward()
        assert loss.item() == 0
        assert (lm.backbone.embeddings.weight.grad == 0).all()


def test_chunked_loss_equals_whole(lm, ids):
    from vlmamba.models.language.loss import next_token_loss

    hidden = torch.randn(3, 11, 16, requires_grad=True)
    whole = next_token_loss(hidden, lm.lm_head, ids)
    parts = next_token_loss(hidden, lm.lm_head, ids, chunk_rows=4)
    close(parts, whole, 1e-6)
    for a, b in zip(
        torch.autograd.grad(whole, (hidden, lm.lm_head.weight)),
        torch.autograd.grad(parts, (hidden, lm.lm_head.weight)),
        strict=True,
    ):
        close(a, b, 1e-6)


def test_logits_to_keep(lm, ids):
    full = lm(ids).logits
    close(lm(ids, logits_to_keep=3).logits, full[:, -3:])
    close(lm(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])
    mask = torch.rand(ids.shape) < 0.5
    close(lm(ids, logits_to_keep=mask).logits, full[mask])
    columns = torch.tensor([[0, 1], [2, 3], [4, 10]])
    close(lm(ids, logits_to_keep=columns).logits, full[torch.arange(3)[:, None], columns])
    with pytest.raises(ShapeError, match=r"mask of shape \(3, 10\) but the input is \(3, 11\)"):
        lm(ids, logits_to_keep=mask[:, 1:])


def test_gradient_checkpointing_changes_nothing(lm, ids):
    lm.train()
    plain = lm(ids, labels=ids).loss
    wanted = torch.autograd.grad(plain, list(lm.parameters()))
    lm.gradient_checkpointing_enable()
    calls = []
    handle = lm.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = lm(ids, labels=ids, use_cache=True).loss
    got = torch.autograd.grad(loss, list(lm.parameters()))
    handle.remove()
    assert len(calls) == 2, "the block was not recomputed"
    assert torch.equal(loss, plain)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 1e-7)


def test_tuple_output(lm, ids):
    logits, cache = lm(ids, use_cache=True, return_dict=False)
    close(logits, lm(ids).logits)
    assert cache.get_seq_length() == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"output_attentions": True, "input_ids": torch.ones(1, 2).long()}, "no attention weights"),
        (
            {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 3)},
            r"attention_mask has shape \(1, 3\) .* at least 4",
        ),
        (
            {"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 1, 4, 4)},
            r"attention_mask has shape \(1, 1, 4, 4\) .* seq_idx",
        ),
        (
            {"input_ids": torch.ones(1, 4).long(), "seq_idx": torch.zeros(1, 3)},
            r"seq_idx has shape \(1, 3\) but the input is \(1, 4\)",
        ),
        (
            {
                "input_ids": torch.ones(1, 4).long(),
                "labels": torch.zeros(1, 3).long(),
                "logits_to_keep": None,
            },
            r"labels have shape \(1, 3\) but hidden states \(1, 4\)",
        ),
        (
            {"input_ids": torch.ones(1, 4).long(), "past_key_values": object()},
            "the cache is a object but MambaLM continues a MambaCache",
        ),
    ],
)
def test_bad_calls(lm, arguments, message):
    with pytest.raises(ShapeError, match=message):
        lm(**arguments)


def test_initialisation_is_the_reference_codes(config):
    torch.manual_seed(0)
    model = MambaLM(
        config(hidden_size=64, num_hidden_layers=4, initializer_range=0.02, rescale_prenorm_residual=True)
    )
    mixer = model.backbone.layers[1].mixer
    assert abs(model.backbone.embeddings.weight.std().item() - 0.02) < 2e-3
    assert model.lm_head.weight is model.backbone.embeddings.weight
    close(mixer.A_log.exp(), torch.arange(1.0, 5.0).expand(128, 4))
    steps = F.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 1e-4
    assert steps.max() <= 0.1 + 1e-6
    bound = 128**-0.5  # torch's Linear: uniform within 1 / sqrt(fan in)
    assert mixer.out_proj.weight.abs().max() <= bound / 2 + 1e-6, "not divided by sqrt(layers)"
    assert mixer.out_proj.weight.abs().max() > bound / 2 * 0.95
    assert mixer.in_proj.weight.abs().max() > 64**-0.5 * 0.95


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("130m", 129_135_360),
        ("370m", 371_516_416),
        ("790m", 793_204_224),
        ("1.4b", 1_372_178_432),
        ("2.8b", 2_768_345_600),
    ],
)
def test_official_sizes(size, count):
    config = mamba_config(size)
    with torch.device("meta"):
        model = MambaLM(config)
    model.tie_weights()
    assert parameter_count(config) == count
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert size in SIZES.names()


def test_adapters_train_every_projection(lm, ids):
    peft = pytest.importorskip("peft")
    targets = ["in_proj", "x_proj", "dt_proj", "out_proj"]
    before = lm(ids).logits
    lm.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), lm.backbone
    )
    assert (lm(ids).logits - before).abs().max() > 1e-3
    lm(ids, labels=ids).loss.backward()
    trained = {
        name.split(".")[-4]
        for name, p in lm.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert trained == set(targets)
