r"""The answer normalisers of the VQA family.

`normalise_vqa` is GT-Vision-Lab/VQA ``PythonEvaluationTools/vqaEvaluation/vqaEval.py`` (``processPunctuation``,
then ``processDigitArticle``), which runs under Python 2: ``\d`` is 0-9 alone, and lower case is taken letter
by letter.
`normalise_m4c` is ``EvalAIAnswerProcessor`` of facebookresearch/mmf ``mmf/utils/m4c_evaluators.py``, copied by LLaVA
(``llava/eval/m4c_evaluator.py``) and lmms-eval (``tasks/_task_utils/vqa_eval_metric.py``); Python 3.
`normalise_vizwiz` is the VizWiz API's ``vqaEval.py``; Python 3, with another table of contractions.

What surprises, and is so in all three:

* Whether a mark is deleted or becomes a space is decided by the text as it came in: deleted when that text has
  it next to a space, or has a comma between digits anywhere (then every mark is deleted).
* The look-behind before the full stop is mistyped, so "5." loses its full stop; only a digit behind it keeps it.
* A flag stands where the count belongs: at most 32 full stops are removed.
* Apostrophe, colon, ``$ % & * # ~ ^ |`` and all marks outside ASCII stay.

VLMEvalKit's ``process_punctuation`` has a working look-behind: there "5." stays "5.".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""The marks, in the order in which they are replaced."""
MOST_FULL_STOPS = 32
"""``re.UNICODE`` as a number: the official calls pass it as the count."""
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
ARTICLES = frozenset(("a", "an", "the"))

_TABLE = """
'ow's'at ow's'at 'ows'at 'ow'sat, 'twas twas, I'd've Id've I'dve, I'm Im, I've Ive, ain't aint,
aren't arent, can't cant, could've couldve, couldn't couldnt, couldn't've couldn'tve couldnt've,
didn't didnt, doesn't doesnt, don't dont, hadn't hadnt, hadn't've hadnt've hadn'tve, hasn't hasnt,
haven't havent, he'd hed, he'd've hed've he'dve, he's hes, how'd howd, how'll howll, how's hows,
isn't isnt, it'd itd, it'd've itd've it'dve, it'll itll, let's let's, ma'am maam, might've mightve,
mightn't mightnt, mightn't've mightnt've mightn'tve, must've mustve, mustn't mustnt, needn't neednt,
not've notve, o'clock oclock, oughtn't oughtnt, shan't shant, she'd've shed've she'dve, she's she's,
should've shouldve, shouldn't shouldnt, shouldn't've shouldnt've shouldn'tve,
somebody'd've somebodyd've somebody'dve, somebody'll somebodyll, somebody's somebodys,
somebodyd somebody'd, someone'd someoned, someone'd've someoned've someone'dve, someone'll someonell,
someone's someones, something'd somethingd, something'd've somethingd've something'dve,
something'll somethingll, that's thats, there'd thered, there'd've thered've there'dve,
there're therere, there's theres, they'd theyd, they'd've theyd've they'dve, they'll theyll,
they're theyre, they've theyve, wasn't wasnt, we'd've wed've we'dve, we've weve, weren't werent,
what'll whatll, what're whatre, what's whats, what've whatve, when's whens, where'd whered,
where's wheres, where've whereve, who'd whod, who'd've whod've who'dve, who'll wholl, who's whos,
who've whove, why'll whyll, why're whyre, why's whys, won't wont, would've wouldve, wouldn't wouldnt,
wouldn't've wouldnt've wouldn'tve, y'all yall, y'all'd've yall'd've y'alld've y'all'dve,
y'all'll yall'll y'allll, you'd youd, you'd've youd've you'dve, you'll youll, you're youre,
you've youve
"""


def _contractions() -> dict[str, str]:
    rows = (row.split() for row in _TABLE.split(","))
    return {key: value for value, *keys in rows for key in keys}


CONTRACTIONS: Mapping[str, str] = _contractions()
"""120 spellings and what they become. Keys with a capital can never match, texts are in lower case by then."""

_STRAIGHT_VALUES = frozenset(("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"))
_STRAIGHT_KEYS = frozenset(("couldn'tve", "hadn'tve"))


def _curly(text: str) -> str:
    return text.replace("'", "\u2019")


VIZWIZ_CONTRACTIONS: Mapping[str, str] = {
    key if key in _STRAIGHT_KEYS else _curly(key): value if key in _STRAIGHT_VALUES else _curly(value)
    for key, value in CONTRACTIONS.items()
}
"""The same in the VizWiz API: its apostrophes are typographic but for a few, so "dont" never becomes "don't"."""


def _words(text: str) -> list[str]:
    return text.lower().split()


def _words_of_python_2(text: str) -> list[str]:
    """Lower case goes letter by letter, whatever stands around one, and U+180E is still white space."""
    if text.isascii():
        return text.lower().split()
    return "".join(letter.lower()[0] for letter in text.replace("\u180e", " ")).split()


class _Rules(NamedTuple):
    full_stop: re.Pattern[str]
    comma: re.Pattern[str]
    words: Callable[[str], list[str]]
    contractions: Mapping[str, str]


_VQA = _Rules(
    re.compile(r"\.(?!\d)", re.ASCII), re.compile(r"\d,\d", re.ASCII), _words_of_python_2, CONTRACTIONS
)
_M4C = _Rules(re.compile(r"\.(?!\d)"), re.compile(r"(?<=\d),+(?=\d)"), _words, CONTRACTIONS)
_VIZWIZ = _Rules(re.compile(r"\.(?!\d)"), re.compile(r"\d,\d"), _words, VIZWIZ_CONTRACTIONS)


def clean(text: str) -> str:
    """Newlines and tabs become spaces, both ends are stripped; other white space inside stays."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_vqa(text: str) -> str:
    """A text as the official VQAv2 evaluator normalises it (when annotators do not all agree)."""
    return _normalise(clean(text), _VQA)


def normalise_m4c(text: str) -> str:
    """A text as m4c's answer processor gives it: for TextVQA, and for LLaVA's VQAv2 and VizWiz uploads."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalise(clean(text), _M4C)


def normalise_vqa_lmms(text: str) -> str:
    """A text as lmms-eval's ``vqav2_process_results`` normalises it: m4c's two steps without its first one."""
    return _normalise(clean(text), _M4C)


def normalise_vizwiz(text: str) -> str:
    """A prediction as the VizWiz API normalises it; annotators' answers it leaves as they are."""
    return _normalise(clean(text), _VIZWIZ)


def _normalise(text: str, rules: _Rules) -> str:
    joins_digits = rules.comma.search(text) is not None
    replaced = text
    for mark in PUNCTUATION:
        if mark in text:
            delete = joins_digits or f"{mark} " in text or f" {mark}" in text
            replaced = replaced.replace(mark, "" if delete else " ")
    replaced = rules.full_stop.sub("", replaced, count=MOST_FULL_STOPS)
    words = (NUMBERS.get(word, word) for word in rules.words(replaced))
    return " ".join(rules.contractions.get(word, word) for word in words if word not in ARTICLES)
