"""Reading yes or no out of generated text, where a benchmark leaves the rule open or several share one."""

from __future__ import annotations

import re

from vlmamba.evaluation.scorers.vqa_text import PUNCTUATION

_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA = re.compile(r"\d,\d")
_WORD = re.compile(r"[^\W_]+")


def read_yes_no(text: str) -> str | None:
    """The first word if it is "yes" or "no" in any case, else None.

    Our own strict rule, for questions with no official one (hateful memes, sarcasm): what does not start with a plain
    answer is unparsable, never a guess.
    """
    word = _WORD.search(text)
    found = word.group().lower() if word else ""
    return found if found in ("yes", "no") else None


def read_yes_no_vlmevalkit(text: str) -> str | None:
    """VLMEvalKit's ``YOrN_Extraction`` (``vlmeval/dataset/utils/yorn.py``): one of the words, and not the other.

    Its punctuation is that of VQA with a working look-behind. None is its "Unknown", which goes to a judge there if
    one is set up and is wrong otherwise.
    """
    text = text.lower()
    joins_digits = _COMMA.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        if mark in text:
            delete = joins_digits or f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if delete else " ")
    words = _FULL_STOP.sub("", cleaned, count=32).split()
    yes, no = "yes" in words, "no" in words
    return None if yes == no else "yes" if yes else "no"
