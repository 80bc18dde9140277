"""What trains: patterns, modes, the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmamba.errors import ConfigError
from vlmamba.training.parts import (
    format_parts,
    match_parameters,
    parts_table,
    set_modes,
    set_trainable,
    trainable_parameters,
)


class Layer(nn.Module):
    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
        self.multi_modal_projector = nn.Linear(4, 4)
        self.language_model = nn.Module()
        self.language_model.embed = nn.Embedding(5, 4)
        self.language_model.layers = nn.ModuleList([Layer(), Layer()])
        self.language_model.head = nn.Linear(4, 5, bias=False)
        self.language_model.head.weight = self.language_model.embed.weight


def names(model: nn.Module) -> set[str]:
    return set(trainable_parameters(model))


class TestPatterns:
    def test_module_name(self) -> None:
        model = Model()
        set_trainable(model, ("multi_modal_projector",))
        assert names(model) == {"multi_modal_projector.weight", "multi_modal_projector.bias"}

    def test_glob_and_regex(self) -> None:
        model = Model()
        set_trainable(model, ("language_model.layers.*.mixer.*", r"re:.*\.1\.norm\.(weight|bias)"))
        assert names(model) == {
            "language_model.layers.0.mixer.weight",
            "language_model.layers.0.mixer.bias",
            "language_model.layers.1.mixer.weight",
            "language_model.layers.1.mixer.bias",
            "language_model.layers.1.norm.weight",
            "language_model.layers.1.norm.bias",
        }

    def test_what_is_not_named_is_frozen_again(self) -> None:
        model = Model()
        set_trainable(model, ("*",))
        set_trainable(model, ("vision_tower",))
        assert names(model) == {"vision_tower.0.weight", "vision_tower.0.bias"}

    def test_a_name_is_no_prefix_of_another_name(self) -> None:
        model = nn.ModuleDict({"layer": nn.Linear(1, 1), "layer2": nn.Linear(1, 1)})
        assert set_trainable(model, ("layer",)) == ["layer.weight", "layer.bias"]

    def test_tied_parameter_counts_once(self) -> None:
        model = Model()
        set_trainable(model, ("language_model.embed",))
        assert names(model) == {"language_model.embed.weight"}
        assert model.language_model.head.weight.requires_grad

    def test_no_match_raises(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"train: the pattern 'mm_projector' matches no parameter. "
            r"Did you mean 'multi_modal_projector'\? "
            r"Top-level modules: vision_tower, multi_modal_projector, language_model.",
        ):
            set_trainable(Model(), ("mm_projector",))

    def test_failed_patterns_change_nothing(self) -> None:
        model = Model()
        with pytest.raises(ConfigError):
            set_trainable(model, ("vision_tower", "nothing"))
        assert all(p.requires_grad for p in model.parameters())

    def test_bad_regex_and_empty(self) -> None:
        with pytest.raises(ConfigError, match=r"'re:\(' is not a valid regular expression"):
            match_parameters(Model(), ("re:(",), key="train")
        with pytest.raises(ConfigError, match="nothing would train"):
            set_trainable(Model(), ())


class TestModes:
    def test_frozen_parts_are_in_eval(self) -> None:
        model = Model().eval()
        set_trainable(model, ("multi_modal_projector",))
        set_modes(model)
        assert model.multi_modal_projector.training and model.training
        assert not any(m.training for m in model.vision_tower.modules())
        assert not any(m.training for m in model.language_model.modules())

    def test_partly_trained_parts_are_in_training(self) -> None:
        model = Model()
        set_trainable(model, ("language_model.layers.1",))
        set_modes(model)
        assert all(m.training for m in model.language_model.modules())

    def test_recomputing_layers_of_frozen_parts(self) -> None:
        model = Model()
        for layer in model.language_model.layers:
            layer.gradient_checkpointing = True
        set_trainable(model, ("multi_modal_projector",))
        set_modes(model)
        layer = model.language_model.layers[0]
        assert layer.training and not layer.drop.training


class TestTable:
    def test_counts(self) -> None:
        model = Model()
        set_trainable(model, ("language_model.embed", "multi_modal_projector"))
        rows = {r.name: (r.trainable, r.frozen) for r in parts_table(model)}
        assert rows == {
            "vision_tower": (0, 16),
            "multi_modal_projector": (20, 0),
            "language_model": (20, 2 * (20 + 8)),
        }
        text = format_parts(parts_table(model))
        assert text.splitlines()[-1].split() == ["total", "40", "72"]

    def test_meta(self) -> None:
        with torch.device("meta"):
            model = Model()
        assert sum(r.total for r in parts_table(model)) == 112
