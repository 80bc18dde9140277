"""Q-Mamba's layers from a checkpoint of Mamba-130M's exact layout and sizes, by the name a recipe gives."""

import json

import pytest
import torch

from vlmamba.errors import CheckpointError
from vlmamba.models.builder import _part_weights
from vlmamba.models.connectors import build_connector

DEPTH, WIDTH, STATE, RANK = 24, 768, 16, 48
ORIGINAL = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
"""config.json of state-spaces/mamba-130m."""
LATER = {
    "model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 768, "num_hidden_layers": 24,
    "vocab_size": 50280, "state_size": 16, "time_step_rank": 48, "expand": 2, "conv_kernel": 4,
}  # fmt: skip
"""Of state-spaces/mamba-130m-hf, what matters of it."""


def weights(embedding):
    """Random weights under the names, and of the shapes, of the published file."""
    generator = torch.Generator().manual_seed(0)
    inner = 2 * WIDTH

    def random(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.1, 0.1, generator=generator)

    state = {f"backbone.{embedding}.weight": random(50280, WIDTH), "backbone.norm_f.weight": random(WIDTH)}
    state["lm_head.weight"] = state[f"backbone.{embedding}.weight"]
    for i in range(DEPTH):
        shapes = {
            "norm.weight": (WIDTH,), "mixer.in_proj.weight": (2 * inner, WIDTH), "mixer.conv1d.weight": (inner, 1, 4),
            "mixer.conv1d.bias": (inner,), "mixer.x_proj.weight": (RANK + 2 * STATE, inner),
            "mixer.dt_proj.weight": (inner, RANK), "mixer.dt_proj.bias": (inner,), "mixer.A_log": (inner, STATE),
            "mixer.D": (inner,), "mixer.out_proj.weight": (WIDTH, inner),
        }  # fmt: skip
        state |= {f"backbone.layers.{i}.{name}": random(*shape) for name, shape in shapes.items()}
    return state


@pytest.mark.slow
@pytest.mark.parametrize(("config", "embedding"), [(ORIGINAL, "embedding"), (LATER, "embeddings")])
def test_every_layer_of_mamba_130m_arrives(tmp_path, config, embedding):
    state = weights(embedding)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "pytorch_model.bin")
    connector = build_connector(
        "qmamba", vision_dim=1152, text_dim=2560, grid=(27, 27)
    )  # every default: the paper's
    loaded = _part_weights("layers", str(tmp_path))
    connector.load_part("layers", loaded)
    arrived = connector.layers.state_dict()
    names = [name for name in state if name.startswith("backbone.layers.")]
    assert len(names) == 10 * DEPTH
    for name in names:
        assert torch.equal(arrived[name.removeprefix("backbone.layers.")], state[name].float()), name
    small = build_connector("qmamba", vision_dim=1152, text_dim=2560, grid=(27, 27), state_size=8)
    with pytest.raises(CheckpointError, match=r"A_log"):
        small.load_part("layers", loaded)
