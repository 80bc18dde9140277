"""state-spaces/mamba's original names <-> transformers' (which are `MambaLM`'s).

Source: `MixerModel` and `MambaLMHeadModel` of mamba_ssm/models/mixer_seq_simple.py. They differ in the
    embedding only.
"""

from __future__ import annotations

from vlmamba.checkpoints.keymap import KeyMap, Rule

STATE_SPACES = KeyMap(
    "the original state-spaces/mamba layout",
    (
        Rule("backbone.embedding.{rest}", "backbone.embeddings.{rest}"),
        Rule("backbone.layers.{i}.norm.{rest}", "backbone.layers.{i}.norm.{rest}"),
        Rule("backbone.layers.{i}.mixer.{rest}", "backbone.layers.{i}.mixer.{rest}"),
        Rule("backbone.norm_f.{rest}", "backbone.norm_f.{rest}"),
        Rule("lm_head.{rest}", "lm_head.{rest}"),
    ),
)
