"""benchmarks/ssm.py on small sizes: every contender is right, a wrong one stops the case."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from vlmamba.ssm import ScanSpec

SHAPE = (2, 12, 8, 4)


@pytest.fixture(scope="module")
def ssm(load):
    return load("ssm")


@pytest.fixture(scope="module")
def contenders(load):
    return load("_contenders")


def spec(**changes):
    return ScanSpec(batch=2, length=12, channels=8, state_size=4, needs_grad=True, **changes)


def test_every_scan_contender_equals_the_oracle(ssm, contenders):
    inputs = contenders.scan_inputs(*SHAPE, dtype=torch.float32, device="cpu")
    racing = contenders.scan_contenders(spec())
    errors = ssm.check("scan", racing, inputs, ssm.reference_scan)
    assert {"vlmamba torch", "plain loop (unbind)", "transformers"} <= errors.keys()
    assert max(errors.values()) < 5e-6


def test_every_conv_contender_equals_the_oracle(ssm, contenders):
    inputs = contenders.conv_inputs(2, 12, 8, 4, dtype=torch.float32, device="cpu")
    racing = contenders.conv_contenders(spec(op="conv"))
    assert {"vlmamba torch", "torch conv1d"} <= ssm.check("conv", racing, inputs, ssm.reference_conv).keys()


def test_a_wrong_contender_is_named(ssm, contenders, common):
    wrong = contenders.Contender("wrong", lambda i: contenders.unbind_loop(i) * 1.001)
    inputs = contenders.scan_inputs(*SHAPE, dtype=torch.float32, device="cpu")
    with pytest.raises(
        common.DisagreementError, match=r"the scan: wrong does not compute the same thing: y is off"
    ):
        ssm.check("the scan", [wrong], inputs, ssm.reference_scan)


def test_the_linear_stand_in_equals_transformers(contenders):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    inputs = contenders.scan_inputs(*SHAPE, dtype=torch.float32, device="cpu")
    own = contenders.Contender("x", lambda i: i["u"], channel_major=True).prepare(inputs, grad=False)
    arguments = [own[name] for name in contenders.SCAN_INPUTS]
    options = {"delta_softplus": True, "return_last_state": True}
    got = contenders.linear_transformers_scan(*arguments, **options)
    for a, b in zip(got, mamba_selective_scan(*arguments, **options), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_program_writes_what_it_measured(ssm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ssm, "QUICK", [SHAPE])
    assert ssm.main(["scan", "conv", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "ssm.json").read_text())["cases"]
    assert [case["title"].split()[0] for case in cases] == ["scan", "scan", "conv", "conv"]
    assert "scan fp32 (B, L, D, N) = (2, 12, 8, 4), forward + backward" in capsys.readouterr().out


def test_a_disagreement_prints_no_figure(ssm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ssm, "QUICK", [SHAPE])
    monkeypatch.setattr(
        ssm, "reference_scan", lambda i: i["u"] * i["z"] + 0 * sum(t.sum() for t in i.values())
    )
    assert ssm.main(["scan", "--quick", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "does not compute the same thing" in captured.err
    assert "| contender |" not in captured.out


def test_an_unknown_piece_is_named(ssm, capsys):
    with pytest.raises(SystemExit):
        ssm.main(["scam"])
    assert "unknown piece 'scam'; there are scan, conv, layer, decode, weights" in capsys.readouterr().err


def test_a_layer_and_its_peer(load, ssm, monkeypatch, tmp_path):
    layer = load("_layer")
    monkeypatch.setattr(layer, "QUICK", [(1, 8, 32)])
    assert ssm.main(["layer", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "ssm.json").read_text())["cases"]
    assert {"four projections alone", "vlmamba torch", "transformers"} <= case["timings"].keys()


def test_int8_weights_are_the_weights_to_a_256th(load):
    decode = load("_decode")
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 48)
    x = torch.randn(3, 2, 32)
    quantised = decode.Int8Linear(linear)
    assert quantised.weight_int8.dtype == torch.int8
    error = (quantised(x) - linear(x)).abs().max() / linear(x).abs().max()
    assert 0 < error < 2e-2


def test_decoding_and_weights(load, ssm, monkeypatch, tmp_path):
    decode = load("_decode")
    small = decode.language_model

    def tiny(size, dtype, device):
        monkeypatch.setattr(decode, "mamba_config", lambda size, **f: real(size, **{**f, **sizes}))
        return small(size, dtype, device)

    real, sizes = decode.mamba_config, {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    monkeypatch.setattr(decode, "language_model", tiny)
    assert ssm.main(["decode", "weights", "--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    cases = json.loads((tmp_path / "ssm.json").read_text())["cases"]
    assert [sorted(case["timings"]) for case in cases] == [
        ["transformers generate", "vlmamba generate", "weights alone"],
        ["bf16", "fp32", "int8"],
    ]
