"""The command line: exit codes, errors without tracebacks, what the verbs print."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from vlmamba.cli import VERBS, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb}" in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"vlmamba {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "vl_manba:pretrain"], "unknown recipe 'vl_manba'. Did you mean 'vl_mamba'"),
        (["train", "vl_mamba:pretain"], "has no recipe 'pretain'. Did you mean 'pretrain'"),
        (["train", "vl_mamba"], "holds several recipes: pretrain, finetune"),
        (["train", "vl_mamba:pretrain", "--dry-run", "--optim.lrr", "1"], "optim.lr"),
        (["train", "vl_mamba:pretrain", "--dry-run", "--optim.lr", "fast"], "optim.lr"),
        (["train", "vl_mamba:pretrain", "--dry-run", "--connector", "vss-l3"], "unknown connector 'vss-l3'"),
        (
            ["train", "vl_mamba:pretrain", "--dry-run", "--model.vision.family", "siglop"],
            "unknown vision encoder 'siglop'",
        ),
        (["train", "vl_mamba:pretrain", "--dry-run", "--train", "projector"], "matches no"),
        (["train", "nowhere/recipe.py:x"], "there is no recipe file nowhere/recipe.py"),
        (["chat", "runs/nothing"], "no exported model at runs/nothing: there is no such directory"),
        (["chat", "docs"], "it holds neither an export nor a checkpoint"),
        (["convert", "runs/nothing", "out"], "runs/nothing"),
    ],
)
def test_mistakes_are_named_without_a_traceback(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_training_without_weights_says_what_is_missing_and_where_to_get_it(capsys, tmp_path):
    assert main(["train", "vl_mamba:pretrain", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    for text in (
        "checkpoints/siglip-so400m-patch14-384",
        "hf download google/siglip-so400m-patch14-384",
        "checkpoints/mamba-2.8b-slimpj",
        "playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        "bash scripts/quickstart.sh",
    ):
        assert text in error
    assert not (tmp_path / "run").exists()


def test_dry_run_shows_the_full_size_model(capsys):
    assert main(["train", "vl_mamba:pretrain", "--dry-run"]) == 0
    first = capsys.readouterr().out
    assert main(["train", "vl_mamba:finetune", "--dry-run"]) == 0
    second = capsys.readouterr().out
    for text in ("729 visual tokens", "64 layers", "2.77B parameters", "27 x 27 patches"):
        assert text in first
        assert text in second
    assert "558,128 samples and 2,181 steps" in first
    assert "665,298 samples and 5,198 steps" in second
    # VSS-L2 at 1152 -> 2560: two linear layers, a norm, and one Mamba layer of inner width 5120.
    mixer = (
        2560 * 10240
        + 5120 * 4
        + 5120
        + 5120 * (160 + 32)
        + 160 * 5120
        + 5120
        + 5120 * 16
        + 5120
        + 5120 * 2560
    )
    connector = 1152 * 2560 + 2560 + 2560 + mixer + 2560 * 2560 + 2560
    assert f"multi_modal_projector: {connector:,} of" in first
    assert f"{connector + 2_768_345_600:,} of" in second


@pytest.mark.parametrize("recipe", ["vl_mamba", "q_mamba", "cobra", "playground"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_recipe_prints_and_repeats_its_config(recipe, stage, capsys, tmp_path):
    assert main(["train", f"{recipe}:{stage}", "--print-config", "--optim.lr", "3e-4"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 0.0003" in printed
    (tmp_path / "config.yaml").write_text(printed)
    assert main(["train", str(tmp_path / "config.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    if recipe != "playground":
        assert main(["train", f"{recipe}:{stage}", "--dry-run"]) == 0
        assert "visual tokens an image" in capsys.readouterr().out


def test_info_prints_backends_and_parts(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for text in ("* ", "torch", "cpu", "reference", "vss-l2", "dinov2", "vicuna_v1", "mamba-ssm"):
        assert text in printed


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "vlmamba", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("vlmamba ")


def test_a_quiet_verb_leaves_logging_as_it_was():
    ours = logging.getLogger("vlmamba")
    before = (ours.level, logging.getLogger().level)
    main(["plan", "train/nothing.py:pretrain"])
    assert (ours.level, logging.getLogger().level) == before
