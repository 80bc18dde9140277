"""Connectors: laws of the scans and of local attention, starts, options, errors."""

import math

import pytest
import torch

from vlmamba.errors import CheckpointError, ConfigError, ShapeError
from vlmamba.models.connectors import CONNECTORS, build_connector
from vlmamba.models.connectors.qmamba import local_windows
from vlmamba.models.language import MambaLM
from vlmamba.testing.models import TINY_OPTIONS

GRID = (4, 4)
SIZES = {"vision_dim": 12, "text_dim": 16, "grid": GRID}


def build(name, *, grid=GRID, seed=0, **options):
    torch.manual_seed(seed)
    return build_connector(name, vision_dim=12, text_dim=16, grid=grid, **{**TINY_OPTIONS[name], **options})


def features(grid=GRID, batch=2):
    return torch.randn(batch, grid[0] * grid[1], 12, generator=torch.Generator().manual_seed(1))


def test_every_registered_connector_is_tested_here():
    assert CONNECTORS.names() == sorted(TINY_OPTIONS)


@pytest.mark.parametrize("name", ["vss-mlp", "vss-l2"])
@pytest.mark.parametrize("scan", ["bsm", "csm"])
@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_bidirectional_scans_commute_with_reversal(name, scan, merge, grid):
    connector, x = build(name, scan=scan, merge=merge, grid=grid), features(grid)
    torch.testing.assert_close(connector(x.flip(1)), connector(x).flip(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["vss-mlp", "vss-l2"])
def test_cross_scan_commutes_with_transposition(name):
    connector, x = build(name, scan="csm"), features()

    def transpose(y):
        return y.unflatten(1, GRID).transpose(1, 2).flatten(1, 2)

    torch.testing.assert_close(connector(transpose(x)), transpose(connector(x)), atol=1e-6, rtol=1e-5)
    bsm = build(name, scan="bsm")
    assert not torch.allclose(bsm(transpose(x)), transpose(bsm(x)), atol=1e-4)


def test_scan_in_front_of_qmamba_may_change():
    qmamba = build("qmamba")
    qmamba.set_scan("backward")
    assert qmamba.pre.vss.scan == "backward"
    rebuilt = build_connector("qmamba", **SIZES, **qmamba.options)
    assert rebuilt.pre.vss.scan == "backward"


def test_scan_without_weights_for_it_is_refused():
    with pytest.raises(ConfigError, match=r"needs the directions columns, columns_reversed"):
        build("vss-l2", scan="bsm", share_weights=False).set_scan("csm")
    with pytest.raises(ConfigError, match="connector 'mlp' has no scan"):
        build("mlp").set_scan("bsm")


@pytest.mark.parametrize(("queries", "keys"), [(4, 9), (9, 9), (256, 729), (729, 729), (5, 3), (1, 7)])
def test_local_windows_follow_the_formula(queries, keys):
    index, valid = local_windows(queries, keys)
    seen = set()
    for i in range(queries):
        expected = list(range(i * keys // queries, math.ceil((i + 1) * keys / queries)))
        assert index[i][valid[i]].tolist() == expected
        seen.update(expected)
    assert seen == set(range(keys))


def test_the_papers_figure_has_four_queries_and_nine_keys():
    index, valid = local_windows(4, 9)
    assert [index[i][valid[i]].tolist() for i in range(4)] == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]


def test_at_depth_one_local_queries_see_their_window_alone():
    connector = build("qmamba", depth=1, pre=None, pre_options=None, num_queries=6)
    x = features()
    y = x.clone()
    y[:, 3] += 1
    moved = (connector(x) - connector(y)).abs().sum((0, 2)) > 1e-7
    index, valid = local_windows(6, 16)
    assert moved.tolist() == [3 in index[i][valid[i]].tolist() for i in range(6)]


def test_qmamba_starts_from_a_mamba_language_model_by_name():
    from transformers import MambaConfig

    lm = MambaLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4))
    connector = build("qmamba")
    connector.load_part("layers", lm.state_dict())
    for i, block in enumerate(lm.backbone.layers):
        assert torch.equal(connector.layers[i].mixer.A_log, block.mixer.A_log)
        assert torch.equal(connector.layers[i].mixer.in_proj.weight, block.mixer.in_proj.weight)
        assert torch.equal(connector.layers[i].norm.weight, block.norm.weight)
    with pytest.raises(CheckpointError, match=r"tensors are missing, first backbone.layers.2"):
        build("qmamba", depth=3).load_part("layers", lm.state_dict())
    with pytest.raises(CheckpointError, match=r"in the file"):
        build("qmamba", width=32).load_part("layers", lm.state_dict())


def test_qmambas_front_starts_from_a_trained_connector():
    trained, connector = build("vss-l2", seed=3), build("qmamba")
    connector.load_part("pre", trained.state_dict())
    assert torch.equal(connector.pre(features()), trained(features()))
    with pytest.raises(CheckpointError, match="connector in front"):
        connector.load_part("pre", build("mlp").state_dict())
    with pytest.raises(ConfigError, match="no part 'front'"):
        connector.load_part("front", {})


def test_qmambas_default_sizes_are_mamba_130ms():
    with torch.device("meta"):
        connector = build_connector("qmamba", vision_dim=1152, text_dim=2560, grid=(27, 27))
    assert (len(connector.layers), connector.queries.shape) == (24, (256, 768))
    mamba = sum(
        p.numel() for n, p in connector.layers.named_parameters() if n.split(".")[1] in ("norm", "mixer")
    )
    assert mamba == 129_135_360 - 50280 * 768 - 768  # Mamba-130M without embeddings and final norm


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mpl", {}, "unknown connector 'mpl'. Did you mean 'mlp'"),
        ("mlp", {"scan": "bsm"}, "connector 'mlp' has no option 'scan'"),
        ("vss-l2", {"scam": "bsm"}, "no option 'scam'. Did you mean 'scan'"),
        ("vss-l2", {"scan": "zigzag"}, "unknown scan 'zigzag'"),
        ("vss-l2", {"merge": "max"}, "merge must be 'sum' or 'mean'"),
        ("mlp", {"depth": 0}, "depth must be at least 1"),
        ("mlp", {"depth": 1, "hidden_dim": 8}, "depth 1 has no hidden layer"),
        ("qmamba", {"attention": "window"}, "attention must be 'local' or 'global'"),
        ("qmamba", {"num_queries": 0}, "num_queries and depth must be at least 1"),
        ("qmamba", {"width": 10, "num_heads": 3}, "num_heads must divide the width"),
        ("qmamba", {"pre": None, "pre_options": {"scan": "csm"}}, "without a connector in front"),
    ],
)
def test_wrong_settings_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_connector(name, **SIZES, **options)


def test_features_of_another_encoder_are_refused():
    with pytest.raises(ShapeError, match=r"\(images, 16, 12\) for its 4 x 4 grid, got \(2, 15, 12\)"):
        build("mlp")(torch.zeros(2, 15, 12))


def test_inference_mode_first_and_training_after():
    local_windows.cache_clear()
    connector = build("qmamba")
    with torch.inference_mode():
        connector(features())
    connector(features()).square().mean().backward()
    assert connector.queries.grad.abs().sum() > 0
