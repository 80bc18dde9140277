"""How many samples a run sees, and how long they are, as far as that is known without reading all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmamba.data.index import RowFile
from vlmamba.errors import DataError
from vlmamba.training.config import TrainConfig
from vlmamba.training.dry_run import rows_of

CHARACTERS_PER_TOKEN = 4.0
"""Of English text under a byte-level BPE, an assumption used for sizes only."""
ROWS_READ = 500


@dataclass(frozen=True)
class DataFacts:
    """What is known of the data.

    Attributes:
        samples: Samples of the whole run, None where rows are not known; where `tokens` ends the run, at most.
        tokens: At which a run of so many steps of tokens ends (`batch.tokens_per_step`); None for all others.
        rows: Where that is from, in words.
        text_tokens: Mean text tokens of a sample, None where no file is there.
        supervised: Share of them in answers.
    """

    samples: float | None
    tokens: float | None
    rows: str
    text_tokens: float | None
    supervised: float | None


def data_facts(config: TrainConfig) -> DataFacts:
    """Rows counted where files are there, as published elsewhere; lengths from a sample of the rows."""
    samples, tokens, origin = _samples(config)
    read = [_characters(Path(s.annotations).expanduser()) for s in config.data.sources if s.kind == "llava"]
    rows, text, answers = (sum(column) for column in zip(*read, strict=True)) if read else (0, 0, 0)
    if not rows or not text:
        return DataFacts(samples, tokens, origin, None, None)
    return DataFacts(samples, tokens, origin, text / rows / CHARACTERS_PER_TOKEN, answers / text)


def _samples(config: TrainConfig) -> tuple[float | None, float | None, str]:
    steps, batch = config.max_steps, config.batch
    by_tokens = batch.tokens_per_step is not None
    tokens = float(steps * batch.tokens_per_step) if steps and batch.tokens_per_step else None
    most = None if steps is None or by_tokens else float(steps * batch.global_batch_size)
    found = [(rows_of(source), source.weight) for source in config.data.sources]
    known = all(count is not None for (count, _), _ in found)
    if config.epochs is None or not known:
        return most, tokens, f"{steps} steps of {batch.step}"
    epoch = sum(max(1, round(count * weight)) for (count, _), weight in found if count is not None)
    published = any("published" in origin for (_, origin), _ in found)
    words = f"{epoch:,} rows{' as published' if published else ''}, {config.epochs} epoch(s)"
    total = float(epoch * config.epochs)
    return (total if most is None else min(total, most)), tokens, words


def _characters(path: Path) -> tuple[int, int, int]:
    """Rows read, their characters, and those of answers; images' own tokens are not text."""
    if not path.is_file():
        return 0, 0, 0
    file = RowFile(path)
    rows = text = answers = 0
    for row in range(0, len(file), max(1, len(file) // ROWS_READ)):
        try:
            turns: Any = file[row].get("conversations", [])
            lengths = [(turn.get("from"), len(str(turn.get("value", "")))) for turn in turns]
        except (DataError, AttributeError):
            continue  # `vlmamba data check` is for those
        rows += 1
        text += sum(length for _, length in lengths)
        answers += sum(length for speaker, length in lengths if speaker == "gpt")
    return rows, text, answers
