"""Reading the files of benchmarks: where they lie, what is in them, and whose answers they hold.

    `files`      finding a benchmark's data, reading JSON, JSON lines and tables, messages about wrong files
    `questions`  rows to samples: LLaVA's question files, pictures, prompts
    `stored`     Hugging Face data sets: the hub, parquet files, folders of ``save_to_disk``
    `answers`    official answer layouts to records; files for servers

Nothing here imports torch.
"""

from __future__ import annotations

from vlmamba.evaluation.layouts.answers import (
    answer_rows,
    as_record,
    in_own_layout,
    join_by_id,
    join_by_position,
    log_odds,
    option_probability,
    read_own,
    read_table_answers,
    write_json,
    write_sheet,
)
from vlmamba.evaluation.layouts.files import (
    Benchmark,
    Document,
    find_data,
    read_document,
    require_keys,
    same_ids,
    strange_ids,
    unique,
)
from vlmamba.evaluation.layouts.questions import (
    LETTER,
    LETTER_CN,
    SHORT_ANSWER,
    UNANSWERABLE,
    cannot_ask,
    llava_questions,
    multiple_choice,
    no_labels,
    picture,
    with_suffix,
)
from vlmamba.evaluation.layouts.stored import is_stored, read_stored, stored_picture, stored_rows

__all__ = [
    "LETTER",
    "LETTER_CN",
    "SHORT_ANSWER",
    "UNANSWERABLE",
    "Benchmark",
    "Document",
    "answer_rows",
    "as_record",
    "cannot_ask",
    "find_data",
    "in_own_layout",
    "is_stored",
    "join_by_id",
    "join_by_position",
    "llava_questions",
    "log_odds",
    "multiple_choice",
    "no_labels",
    "option_probability",
    "picture",
    "read_document",
    "read_own",
    "read_stored",
    "read_table_answers",
    "require_keys",
    "same_ids",
    "stored_picture",
    "stored_rows",
    "strange_ids",
    "unique",
    "with_suffix",
    "write_json",
    "write_sheet",
]
