"""Build the playground's mini parts: a tokenizer, a mini SigLIP encoder and a mini Mamba language model.

They stand in for the downloads of the real recipe (SigLIP-SO400M and Mamba-2.8B), so that both training
stages can run on a small machine without any.  They are shipped in ``playground/mini``; nobody has to run
this.  To rebuild:

    python playground/build_mini.py --out playground/mini --work playground/build --threads 2

What each part has seen: the tokenizer and the language model nothing but text; the encoder scenes that are
composed from the training digit samples alone.  The held-out samples of ``scenes.digit_pools`` are seen by
none of them. Steps are resumable: a part that is finished in ``--out`` is kept (delete its folder to train
it anew), a part in progress goes on from ``--work``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from mini_encoder import EncoderTraining, train_encoder
from mini_language import END, SYSTEM, LanguageTraining, train_language
from phrases import DESCRIBE, SHORT_ANSWER, caption, dialogue, pair_dialogue, small_talk
from scenes import digit_pools, sample_scene
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, SiglipImageProcessor

logger = logging.getLogger("build_mini")

PARTS = ("tokenizer", "siglip", "mamba")
LIMIT = 8_000_000  # bytes, all parts together
CHAT_WORDS = (
    f"{SYSTEM} USER: hello ASSISTANT: Hello.",
    "<|system|>\n<|user|>\n<|assistant|>\n",
    "### Human: ### Assistant: Human: Assistant: User: Question: Answer: In: Out: image 1 image 2",
)


def corpus(seed: int, scenes: int) -> list[str]:
    """Texts in the playground's language, for the tokenizer (no picture is drawn)."""
    rng = np.random.default_rng([seed, 1])
    pool, _ = digit_pools()
    texts: list[str] = []
    for _ in range(scenes):
        one, two = sample_scene(rng, pool), sample_scene(rng, pool)
        texts.append(caption(one, rng))
        for question in [*dialogue(one, rng, 3), *pair_dialogue(one, two, rng, 1)]:
            texts.append(f"USER: {question.text} ASSISTANT: {question.answer}")
        texts.append("USER: {} ASSISTANT: {}".format(*small_talk(rng)))
        texts.extend([DESCRIBE[int(rng.integers(len(DESCRIBE)))], f"\n{SHORT_ANSWER}"])
    return texts + list(CHAT_WORDS) * (scenes // 4 + 2)


def build_tokenizer(out: Path, seed: int, vocab_size: int = 1000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with GPT-NeoX's properties: no BOS, pad = eos = unk = id 0."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(seed, 4000), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, unk_token=END, model_max_length=2048
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def build_encoder(out: Path, work: Path, tokenizer: PreTrainedTokenizerFast, recipe: EncoderTraining) -> None:
    """Pre-train the encoder and save it as a plain transformers directory."""
    encoder = train_encoder(tokenizer, recipe, work)
    encoder.config._attn_implementation = "sdpa"
    encoder.save_pretrained(out)
    size = {"height": encoder.config.image_size, "width": encoder.config.image_size}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(out)


def build_language(
    out: Path, work: Path, tokenizer: PreTrainedTokenizerFast, recipe: LanguageTraining
) -> None:
    """Train the language model and save it, with its tokenizer, as a plain transformers directory."""
    model = train_language(tokenizer, recipe, work)
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["MambaForCausalLM"]  # the layout is transformers' own
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)


def write_manifest(out: Path) -> dict[str, dict[str, int | str]]:
    """List the shipped files with sizes and SHA-256 in ``manifest.json``; too much weight is a ValueError."""
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name not in ("manifest.json", "README.md"))
    manifest: dict[str, dict[str, int | str]] = {
        path.relative_to(out).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    total = sum(path.stat().st_size for path in files)
    if total > LIMIT:
        raise ValueError(f"{out}: {total:,} bytes in all, more than the {LIMIT:,} that are shipped")
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "mini")
    parser.add_argument("--work", type=Path, default=here / "build", help="checkpoints of parts in progress")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--encoder-steps", type=int, default=EncoderTraining.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    out: Path = arguments.out
    if "tokenizer" in arguments.parts and not (out / "tokenizer").exists():
        build_tokenizer(out / "tokenizer", arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer", trust_remote_code=False)
    if "siglip" in arguments.parts and not (out / "siglip").exists():
        recipe = EncoderTraining(seed=arguments.seed, steps=arguments.encoder_steps)
        build_encoder(out / "siglip", arguments.work, tokenizer, recipe)
    if "mamba" in arguments.parts and not (out / "mamba").exists():
        language = LanguageTraining(seed=arguments.seed)
        build_language(out / "mamba", arguments.work, tokenizer, language)
    write_manifest(out)


if __name__ == "__main__":
    main()
