"""What an exported model holds."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

from vlmamba.testing import tiny_model
from vlmamba.training.export import export_model


@pytest.mark.parametrize("connector", ["mlp", "vss-l2", "qmamba"])
def test_a_bf16_export_keeps_the_decay_of_the_state_in_fp32(tmp_path, connector: str) -> None:
    model, processor = tiny_model(connector)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A_log", ".D", ".dt_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    export_model(model, processor, tmp_path / "export", dtype=torch.bfloat16)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", dtype=torch.bfloat16).eval()
    exact = 0
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if name.endswith((".A_log", ".D", ".dt_proj.bias")):
            assert theirs.dtype == torch.float32, name
            assert torch.equal(ours, theirs), name
            exact += 1
        else:
            assert theirs.dtype == torch.bfloat16, name
    assert exact >= 2
    ids = torch.tensor([[5, 6, 7, 8]])
    out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)
