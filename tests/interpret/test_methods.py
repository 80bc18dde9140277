"""Maps of whole models: they sum to what they explain, reach patches through every connector, and refuse misfits."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.common.load import load_model
from vlmamba.errors import CheckpointError, ConfigError, DataError
from vlmamba.interpret import methods
from vlmamba.interpret.answers import answer_question, run_from_features
from vlmamba.interpret.held import held
from vlmamba.interpret.methods import explain, methods_of
from vlmamba.interpret.token_patches import query_attention, token_patches
from vlmamba.models.connectors.qmamba import CrossAttention, local_windows
from vlmamba.models.language import MambaLM
from vlmamba.testing import tiny_model
from vlmamba.testing.models import tiny_text_config


def picture(seed=0, size=(20, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def asked(connector="vss-l2", images=1, **options):
    model, processor = tiny_model(connector, **options)
    pictures = [picture(i) for i in range(images)]
    return model, processor, answer_question(model, processor, pictures, "what?", max_new_tokens=3)


@pytest.mark.parametrize("connector", ["mlp", "vss-mlp", "vss-l2", "qmamba"])
def test_every_connector_and_method_gives_maps(connector):
    model, _, answer = asked(connector, images=2)
    for method in methods_of(model):
        found = explain(model, answer, 0, method)
        assert found.shape == (2, 16), method
        assert torch.isfinite(found).all()
        assert found.abs().max() > 0
    layer = explain(model, answer, 0, "hidden-attention", layer=1)
    assert layer.shape == (2, 16)
    assert (layer > 0).all()


def test_integrated_gradients_sum_to_the_difference_of_log_probabilities(monkeypatch):
    model, _, answer = asked()
    monkeypatch.setattr(methods, "STEPS", 64)
    blank = answer.features.mean(1, keepdim=True).expand_as(answer.features)
    place, token = answer.first, answer.token_id(1)
    with torch.no_grad():
        logits = [run_from_features(model, answer.input_ids, f)[1] for f in (answer.features, blank)]
    here, there = (x[0, place].log_softmax(-1)[token] for x in logits)
    assert abs(here - there) > 1e-4
    torch.testing.assert_close(
        explain(model, answer, 1, "gradient").sum(), here - there, rtol=0.01, atol=1e-5
    )


def test_gradient_x_input_is_a_finite_difference():
    model, _, answer = asked()
    patch, step = 5, 1e-2
    values = []
    for factor in (1 + step, 1 - step):
        features = answer.features.clone()
        features[0, patch] *= factor
        with torch.no_grad():
            _, logits = run_from_features(model, answer.input_ids, features)
        values.append(logits[0, answer.first - 1].log_softmax(-1)[answer.token_id(0)])
    expected = (values[0] - values[1]) / (2 * step)
    found = explain(model, answer, 0, "gradient-x-input")[0, patch]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)


def test_a_held_language_models_logit_is_the_sum_over_its_tokens():
    """All layers composed: without biases nothing of the logit is left over."""
    model, _, answer = asked("mlp")
    language = model.language_model
    for block in language.backbone.blocks():
        torch.nn.init.zeros_(block.mixer.conv1d.bias)
    embeds = model.embed(answer.input_ids, torch.zeros(1, 3, 16, 16)).detach().requires_grad_()
    plain = language(inputs_embeds=embeds).logits
    with held(language):
        logits = language(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(logits[0, -2, 7], embeds)
    torch.testing.assert_close((slope * embeds).sum(), logits[0, -2, 7], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("connector", ["mlp", "vss-mlp", "vss-l2", "qmamba"])
def test_shares_of_patches_sum_to_one(connector):
    model, _, answer = asked(connector)
    shares = token_patches(model.multi_modal_projector, answer.features)
    assert shares.shape == (1, model.multi_modal_projector.num_tokens, 16)
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:2]))


def test_a_forward_scan_shares_nothing_with_later_patches():
    model, _, answer = asked("vss-l2", scan="forward")
    shares = token_patches(model.multi_modal_projector, answer.features)[0]
    assert (shares.triu(1) == 0).all()
    assert (shares.diagonal() > 0).all()


@pytest.mark.parametrize("kind", ["local", "global"])
def test_attention_weights_are_those_the_layer_uses(kind):
    model, _, answer = asked("qmamba", attention=kind, depth=1, pre=None, pre_options=None)
    connector = model.multi_modal_projector
    weights = query_attention(connector, answer.features)[0]
    (layer,) = [m for m in connector.modules() if isinstance(m, CrossAttention)]
    index, valid = local_windows(6, 16)
    seen = torch.zeros(6, 16, dtype=torch.bool)
    for row in range(6):
        seen[row, index[row, valid[row]]] = True
    assert ((weights > 0) == (seen if kind == "local" else torch.ones_like(seen))).all()
    # With values that all heads copy alike, the output is the weights times the values.
    with torch.no_grad():
        layer.num_heads = 1
        given: list = []
        hook = layer.register_forward_hook(lambda m, i, o: given.append((i, o)))
        weights = query_attention(connector, answer.features)
        hook.remove()
        (_, features), out = given[0]
        torch.testing.assert_close(layer.out_proj(weights @ layer.v_proj(features)), out)


def test_errors_say_what_does_not_fit():
    model, processor, answer = asked("mlp")
    with pytest.raises(ConfigError, match="'cross-attention' needs a Q-Mamba connector, and connector 'mlp'"):
        explain(model, answer, 0, "cross-attention")
    with pytest.raises(ConfigError, match="unknown method 'gradeint'"):
        explain(model, answer, 0, "gradeint")
    with pytest.raises(ConfigError, match="layer 2 is out of range: the language model has 2 layers, 0 to 1"):
        explain(model, answer, 0, "hidden-attention", layer=2)
    with pytest.raises(ConfigError, match="answer token 9 is out of range: the answer has 3 tokens, 0 to 2"):
        explain(model, answer, 9)
    with pytest.raises(ConfigError, match="'gradient' has no layers to choose from"):
        explain(model, answer, 0, "gradient", layer=0)
    with pytest.raises(DataError, match="the question has no image: give one"):
        answer_question(model, processor, [], "what?")


def test_a_transformer_has_no_hidden_attention():
    model, _, answer = asked("mlp", language="llama")
    assert methods_of(model) == ["gradient", "gradient-x-input"]
    with pytest.raises(ConfigError, match="needs a Mamba language model, and this one is 'llama'"):
        explain(model, answer, 0, "hidden-attention")
    assert explain(model, answer, 0, "gradient").abs().max() > 0


def test_a_text_only_model_is_refused(tmp_path):
    MambaLM(tiny_text_config()).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config.json is of a model of type .mamba., which sees no image"
    ):
        load_model(tmp_path)


def test_an_unknown_connector_is_named():
    class Pool(torch.nn.Module):
        name = "pool"

    with pytest.raises(ConfigError, match="connector 'pool' has no known way from its visual tokens back"):
        token_patches(Pool(), torch.zeros(1, 16, 24))
