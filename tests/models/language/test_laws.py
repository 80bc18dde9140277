"""Every family of language models holds the laws or says no: packed, padded, split, stepped, reloaded."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from vlmamba.cli import main
from vlmamba.errors import CheckpointError, ConfigError, ShapeError
from vlmamba.models.language import (
    build_language_model,
    language_family,
    language_logits,
    load_language_model,
    recurrent,
    run_language_model,
)
from vlmamba.models.language.attention import packed_attention_mask
from vlmamba.models.language.causality import check_causal, check_packs
from vlmamba.models.language.families import FAMILIES
from vlmamba.models.language.laws import NAMES, check_laws
from vlmamba.testing.families import TINY_FAMILIES, tiny_config

REFUSED = {"recurrent_gemma", "rwkv"}
WINDOWED = {"cohere2", "phi3", "mistral", "gemma2", "gemma3_text", "gpt_oss"}


def tiny(model_type):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_language_model(tiny_config(model_type)).eval()


def expected(model_type):
    """What each family is known to refuse; everything else must be exact."""
    if model_type in recurrent.MEASURED:
        split = {"split"} if model_type in recurrent.NEVER else set()
        return {"packed", "continued"} | split
    return {"continued"} if model_type in WINDOWED else set()


@pytest.mark.parametrize("model_type", sorted(set(TINY_FAMILIES) - REFUSED))
def test_laws(model_type):
    laws = {law.name: law for law in check_laws(tiny(model_type))}
    assert tuple(laws) == NAMES
    assert {name for name, law in laws.items() if law.verdict == "wrong"} == set(), laws
    assert {name for name, law in laws.items() if law.verdict == "refused"} == expected(model_type)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_is_not_exact_is_refused_where_it_is_built(model_type, tmp_path):
    with pytest.raises(ConfigError, match=rf"'{model_type}' is refused: its recurrent layers are not known"):
        build_language_model(tiny_config(model_type))
    tiny_config(model_type).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is refused"):
        load_language_model(tmp_path)


def test_the_page_says_what_the_code_does():
    page = Path(__file__).parents[3] / "docs" / "backbones.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(TINY_FAMILIES)
    for name, *cells in rows:
        model_type = name.strip("`")
        refused = set(NAMES) if model_type in REFUSED else expected(model_type)
        words = {law: cell.split()[0] for law, cell in zip(NAMES, cells, strict=True)}
        assert words == {law: "refused" if law in refused else "exact" for law in NAMES}


def test_the_laws_find_what_is_wrong(monkeypatch):
    """Each law fails on a model that breaks it."""

    def broken(model_type, **changes):
        model = tiny(model_type)
        for name, value in changes.items():
            setattr(model.config, name, value)
        return {law.name for law in check_laws(model) if law.verdict == "wrong"}

    # decoding without the clamp of time steps, as transformers has it
    monkeypatch.setattr(recurrent, "_clamped_steps", lambda model: recurrent.nullcontext())
    assert broken("mamba2") == {"stepped"}
    monkeypatch.undo()
    # attention without a mask
    assert broken("llama", _attn_implementation=None) >= {
        "causal",
        "stepped",
        "split",
        "continued",
        "padded right",
    }
    # masks without windows
    family = language_family(tiny_config("gemma2"))
    assert family.packs is True
    from vlmamba.models.language import attention

    monkeypatch.setattr(attention, "window_of", lambda config: None)
    assert "packed" in broken("gemma2")
    monkeypatch.undo()
    # the head alone, without the soft cap behind it
    monkeypatch.setattr(attention, "logits", lambda model, hidden: model.lm_head(hidden))
    assert broken("gemma2") == {"logits"}
    assert broken("granite") == {"logits"}
    assert broken("llama") == set()


def test_windows_in_packed_rows_count_tokens():
    """Column by column, written out: sample, order, window, padding."""
    seq_idx = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1]])
    mask = packed_attention_mask(seq_idx, torch.float32, real, window=2)[0, 0] == 0
    numbers = {0: 0, 1: 1, 2: 2, 3: 3, 4: 0, 6: 1, 7: 2}
    for q in range(8):
        for k in range(8):
            if q == 5 or k == 5:
                assert bool(mask[q, k]) == (q == k) or q == 5
                continue
            same = bool(seq_idx[0, q] == seq_idx[0, k])
            assert bool(mask[q, k]) == (same and 0 <= numbers[q] - numbers[k] < 2), (q, k)


@pytest.mark.parametrize("model_type", ["mamba2", "gemma2"])
def test_padding_behind_tokens_on_a_cache_is_refused(model_type):
    model = tiny(model_type)
    embeds = model.get_input_embeddings()(torch.ones(2, 5).long())
    right = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    with pytest.raises(
        ConfigError, match="padding behind tokens on a cache would not be exact: with padding between"
    ):
        run_language_model(model, inputs_embeds=embeds, attention_mask=right, use_cache=True)
    run_language_model(model, inputs_embeds=embeds, attention_mask=right)
    run_language_model(model, inputs_embeds=embeds, attention_mask=right.flip(1), use_cache=True)


def test_caches_of_another_kind_are_refused():
    for model_type, other in (("mamba2", "llama"), ("llama", "mamba"), ("mamba", "mamba2")):
        ids = torch.ones(1, 3).long()
        foreign = tiny(other)
        cache = run_language_model(
            foreign, inputs_embeds=foreign.get_input_embeddings()(ids), use_cache=True
        ).cache
        model = tiny(model_type)
        with pytest.raises(ShapeError, match="pass the cache that an earlier call returned"):
            run_language_model(model, inputs_embeds=model.get_input_embeddings()(ids), cache=cache)


def test_a_family_added_by_one_line_is_chosen(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
    chosen = []

    def family(config):
        chosen.append(config.model_type)
        return FAMILIES.get("attention")(config)

    FAMILIES.add("qwen3", family)
    model = tiny("qwen3")
    language_logits(model, torch.randn(2, 16))
    assert set(chosen) == {"qwen3"}
    with pytest.raises(ConfigError, match="'qwen3' is registered twice"):
        FAMILIES.add("qwen3", "other:family")


def test_unmeasured_recurrent_types_are_refused():
    from transformers import AutoConfig

    for model_type in ("xlstm", "kimi_linear", "minimax"):
        with pytest.raises(ConfigError, match=r"is refused: .* use one of mamba, bamba"):
            build_language_model(AutoConfig.for_model(model_type))


def test_self_checks_say_what_is_wrong():
    check_causal(tiny("llama"))
    check_packs(tiny("llama"))
    blind = tiny("llama")
    blind.config._attn_implementation = None
    blind.train()
    with pytest.raises(
        ConfigError, match=r"sees what comes later: .*\(attn_implementation is None\).* to sdpa or eager"
    ):
        check_causal(blind)
    assert all(module.training for module in blind.modules())
    with pytest.raises(
        ConfigError, match=r"'mamba2': packed rows \(data.pack_length\) .* set data.pack_length none"
    ):
        check_packs(tiny("mamba2"))


def test_a_family_that_leaks_is_found_where_packing_is_asked_for(monkeypatch):
    from vlmamba.models.language import attention

    def one_sample(config, seq_idx, dtype, attention_mask):
        return packed_attention_mask(torch.zeros_like(seq_idx), dtype)

    monkeypatch.setattr(attention, "_packed_masks", one_sample)
    with pytest.raises(ConfigError, match="mixes the samples of a packed row"):
        check_packs(tiny("llama"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packing_with_each_implementation_of_attention(implementation):
    model = build_language_model(
        LlamaConfig(**tiny_config("llama").to_diff_dict(), attn_implementation=implementation)
    )
    assert model.config._attn_implementation == implementation
    laws = {law.name: law.verdict for law in check_laws(model)}
    assert set(laws.values()) == {"exact"}


def test_code_of_its_own_is_not_run(tmp_path):
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(CheckpointError, match=r"model_type 'mine' is code of its own .* runs no code"):
        load_language_model(tmp_path)


def test_command(tmp_path, capsys):
    tiny("gemma2").save_pretrained(tmp_path / "gemma")
    (tmp_path / "hybrid").mkdir()
    tiny_config("bamba").save_pretrained(tmp_path / "hybrid")
    tiny_config("rwkv").save_pretrained(tmp_path / "rwkv")
    paths = [tmp_path / "gemma", tmp_path / "hybrid" / "config.json", tmp_path / "rwkv"]
    assert main(["check", "language", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "| Language model | causal | logits | packed |" in printed
    assert "everything, refused (`rwkv`)" in printed
    assert "3 language model(s), 0 broken law(s)" in printed
    assert main(["check", "language", str(tmp_path / "nothing")]) == 2


def test_command_needs_a_model(capsys):
    with pytest.raises(SystemExit):
        main(["check", "language"])
    assert "give the language models to check, or --all" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", ["mamba", "gpt2", "mistral"])
def test_a_sample_starts_where_the_number_changes_whatever_it_is(model_type):
    """A number that stood there before is another sample, also with padding between; a packed row fills no cache."""
    model = tiny(model_type)
    embeds = model.get_input_embeddings()(torch.arange(1, 12)[None])
    mask = torch.tensor([[1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1]])

    def run(*numbers):
        ids = torch.tensor([numbers], dtype=torch.int32)
        return run_language_model(model, inputs_embeds=embeds, seq_idx=ids, attention_mask=mask).hidden[
            mask == 1
        ]

    fresh = run(0, 0, 0, 1, 9, 1, 1, 2, 9, 2, 2)
    torch.testing.assert_close(run(0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0), fresh, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), fresh, atol=1e-3)
    with pytest.raises(ShapeError, match="a packed row cannot be continued"):
        run_language_model(model, inputs_embeds=embeds, seq_idx=torch.zeros(1, 11).int(), use_cache=True)
