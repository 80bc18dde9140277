"""Write the playground's data: real image files, captions, conversations, held-out questions, as LLaVA does.

    python playground/make_data.py                 # playground/data/mini: 16,000 pictures, under a minute

Layout under ``--out``::

    pretrain/captions.json        stage 1: [{"id", "image", "conversations": [human, gpt]}]
    pretrain/images/00000/*.jpg   "image" is relative to pretrain/images
    finetune/conversations.json   stage 2: several turns; some rows are text-only, some have two images
    finetune/images/00000/*.jpg
    heldout/questions.jsonl       {"question_id", "image" (one or a list), "text", "answer", "category"}
    heldout/scenes.json           what is in every held-out picture (ground truth)
    heldout/images/*.jpg
    benchmarks/                   held-out pictures as VQAv2, GQA, POPE and MMBench have theirs (make_benchmarks.py)
    metadata.json                 options, sizes, the digit split, what answering without looking would score

The same options and seed give byte-identical files.  Held-out pictures use digit samples that no training
picture uses.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from make_benchmarks import benchmarks_there, make_benchmarks
from numpy.random import Generator
from phrases import (
    DESCRIBE,
    SHORT_ANSWER,
    Question,
    ask,
    ask_pair,
    caption,
    dialogue,
    pair_dialogue,
    small_talk,
)
from PIL import Image
from scenes import SIDE, SPLIT_SEED, Scene, digit_pools, render, sample_scene, samples_of
from tqdm import tqdm

FORMAT = 1
PARTS = ("pretrain", "finetune", "heldout", "benchmarks")
STREAMS = {"pretrain": 11, "finetune": 12, "heldout": 13}  # keep the random streams of the parts apart
HELDOUT_SHARES = {
    "digit": 0.30,
    "colour": 0.175,
    "position": 0.175,
    "exists": 0.15,
    "count": 0.125,
    "compare": 0.075,
}
TEXT_ONLY, TWO_IMAGES, IMAGE_LAST, SUFFIX, WITH_CAPTION = 0.06, 0.14, 0.10, 0.30, 0.50


@dataclass(frozen=True)
class Options:
    """What to write; sizes are numbers of rows, scenes and questions."""

    captions: int = 6000
    conversations: int = 8000
    heldout_scenes: int = 400
    heldout_questions: int = 2000
    seed: int = 0


def _rng(options: Options, part: str, index: int) -> Generator:
    return np.random.default_rng([options.seed, STREAMS[part], index])


def _save(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format="JPEG", quality=95, subsampling=0)


def _shard(index: int, letter: str = "") -> str:
    return f"{index // 1000:05d}/{index:09d}{letter}.jpg"


def _turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": value}
        for pair in pairs
        for speaker, value in zip(("human", "gpt"), pair, strict=True)
    ]


def caption_rows(options: Options, root: Path, used: set[int]) -> Iterator[dict]:
    """Stage-1 rows, one picture and one caption each; the pictures are written on the way."""
    pool, _ = digit_pools()
    for index in range(options.captions):
        rng = _rng(options, "pretrain", index)
        scene = sample_scene(rng, pool)
        used |= samples_of([scene])
        name = _shard(index)
        _save(render(scene), root / "pretrain/images" / name)
        request = DESCRIBE[int(rng.integers(len(DESCRIBE)))]
        human = f"{request}\n<image>" if rng.random() < 0.25 else f"<image>\n{request}"
        yield {"id": f"c{index:06d}", "image": name, "conversations": _turns([(human, caption(scene, rng))])}


def _with_images(pairs: list[tuple[str, str]], images: int, rng: Generator) -> list[tuple[str, str]]:
    """Mark the images in the first turn, and in some rows ask for short answers there (as LLaVA-1.5 does)."""
    text, answer = pairs[0]
    if rng.random() < SUFFIX and "." not in answer:
        text = f"{text}\n{SHORT_ANSWER}"
    if images == 1 and rng.random() < IMAGE_LAST:
        text = f"{text}\n<image>"
    else:
        text = "<image>\n" * images + text
    return [(text, answer), *pairs[1:]]


def conversation_rows(options: Options, root: Path, used: set[int], asked: list[Question]) -> Iterator[dict]:
    """Stage-2 rows: about four turns over one picture, two, or none; ``asked`` collects the questions."""
    pool, _ = digit_pools()
    for index in range(options.conversations):
        rng = _rng(options, "finetune", index)
        row_id, draw = f"f{index:06d}", rng.random()
        if draw < TEXT_ONLY:
            talk = [small_talk(rng) for _ in range(int(rng.integers(2, 5)))]
            yield {"id": row_id, "conversations": _turns(talk)}
            continue
        two = draw < TEXT_ONLY + TWO_IMAGES
        scenes = [sample_scene(rng, pool) for _ in range(2 if two else 1)]
        questions = pair_dialogue(*scenes, rng, int(rng.integers(2, 5))) if two else []
        if not questions:
            scenes, two = scenes[:1], False
            questions = dialogue(scenes[0], rng, int(rng.integers(5, 10)))
        asked.extend(questions)
        used |= samples_of(scenes)
        pairs = [(q.text, q.answer) for q in questions]
        if not two and rng.random() < WITH_CAPTION:
            # Last, so that no question can be answered by reading the description.
            pairs.append((DESCRIBE[int(rng.integers(len(DESCRIBE)))], caption(scenes[0], rng)))
        names = [_shard(index, "ab"[i] if two else "") for i in range(len(scenes))]
        for scene, name in zip(scenes, names, strict=True):
            _save(render(scene), root / "finetune/images" / name)
        conversations = _turns(_with_images(pairs, len(scenes), rng))
        yield {"id": row_id, "image": names if two else names[0], "conversations": conversations}


def heldout_scenes(options: Options) -> list[Scene]:
    """Held-out scenes, from held-out digit samples; one, two, three and four digits equally often."""
    _, pool = digit_pools()
    return [
        sample_scene(_rng(options, "heldout", index), pool, num_digits=1 + index % 4)
        for index in range(options.heldout_scenes)
    ]


def heldout_questions(options: Options, scenes: Sequence[Scene]) -> list[tuple[list[int], Question]]:
    """Questions with the indices of their scenes: fixed shares per category, yes as often as no."""
    rng = _rng(options, "heldout", 10**9)
    total = options.heldout_questions
    plan = [name for name, share in HELDOUT_SHARES.items() for _ in range(round(share * total))]
    plan = [plan[int(i)] for i in rng.permutation(len(plan))][:total]
    plan += ["digit"] * (total - len(plan))
    rows: list[tuple[list[int], Question]] = []
    seen: set[tuple] = set()
    wanted = {"exists": ["yes", "no"], "compare": ["first", "second"]}
    number: Counter[str] = Counter()
    for category in plan:
        answers = wanted.get(category)
        answer = answers[number[category] % 2] if answers else None
        for attempt in range(10_000):
            # count questions go round over the scenes, hence evenly over one to four digits
            going_round, anywhere = number[category] + attempt, int(rng.integers(len(scenes)))
            first = (going_round if category == "count" else anywhere) % len(scenes)
            where = [first]
            if category == "compare":
                where.append((first + 1 + int(rng.integers(len(scenes) - 1))) % len(scenes))
                question = ask_pair(scenes[where[0]], scenes[where[1]], rng)
            else:
                question = ask(category, scenes[first], rng)
            if question is None or (answer is not None and question.answer != answer):
                continue
            key = (
                *where,
                question.kind,
                *question.slots.values(),
                question.text if category == "count" else "",
            )
            if key not in seen:
                break
        else:
            raise ValueError(
                f"cannot ask {total} different held-out questions about {len(scenes)} scenes "
                f"(stuck at {category!r}); raise --heldout-scenes or lower --heldout-questions"
            )
        seen.add(key)
        number[category] += 1
        rows.append((where, question))
    return rows


def blind_baseline(asked: Sequence[Question], heldout: Sequence[Question]) -> dict:
    """What answering without looking scores on the held-out questions, by rules learned from the training
    answers.

    ``by_category`` gives each category's most frequent training answer; ``by_question`` the most frequent
    training answer to the very same question (falling back to the category), the best that a model without
    eyes can do.
    """
    categories: dict[str, Counter[str]] = defaultdict(Counter)
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in asked:
        categories[question.category][question.answer] += 1
        texts[question.text][question.answer] += 1
    hits: dict[str, dict[str, list[bool]]] = {
        "by_category": defaultdict(list),
        "by_question": defaultdict(list),
    }
    for question in heldout:
        common = categories[question.category].most_common(1)
        fallback = common[0][0] if common else ""
        best = texts[question.text].most_common(1) if question.text in texts else []
        hits["by_category"][question.category].append(fallback == question.answer)
        hits["by_question"][question.category].append((best[0][0] if best else fallback) == question.answer)
    result: dict = {}
    for rule, table in hits.items():
        flat = [hit for values in table.values() for hit in values]
        result[rule] = {"overall": round(sum(flat) / max(len(flat), 1), 4)}
        result[rule] |= {name: round(sum(v) / len(v), 4) for name, v in sorted(table.items())}
    return result


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_heldout(options: Options, root: Path, quiet: bool) -> tuple[list[Scene], list[Question]]:
    scenes = heldout_scenes(options)
    names = [f"{index:06d}.jpg" for index in range(len(scenes))]
    for name, scene in zip(tqdm(names, desc="held-out pictures", disable=quiet), scenes, strict=True):
        _save(render(scene), root / "heldout/images" / name)
    _write_json(root / "heldout/scenes.json", {n: s.to_dict() for n, s in zip(names, scenes, strict=True)})
    rows = heldout_questions(options, scenes)
    rng = _rng(options, "heldout", 10**9 + 1)
    with (root / "heldout/questions.jsonl").open("w", encoding="utf-8") as lines:
        for number, (where, question) in enumerate(rows):
            images = [names[i] for i in where]
            suffix = f"\n{SHORT_ANSWER}" if rng.random() < SUFFIX else ""
            row = {
                "question_id": number,
                "image": images[0] if len(images) == 1 else images,
                "text": question.text + suffix,
                "answer": question.answer,
                "category": question.category,
                "kind": question.kind,
                "slots": question.slots,
            }
            lines.write(json.dumps(row) + "\n")
    return scenes, [question for _, question in rows]


def _clear(root: Path) -> None:
    """Remove an earlier data set of ours; anything else in the way is an error, never deleted."""
    if not root.exists():
        return
    ours = (root / "metadata.json").is_file() or (root / ".incomplete").is_file()
    if not ours and any(root.iterdir()):
        raise FileExistsError(f"{root} is not empty and holds no playground data; choose another --out")
    for part in PARTS:
        shutil.rmtree(root / part, ignore_errors=True)
    (root / "metadata.json").unlink(missing_ok=True)


def make_data(options: Options, root: Path, *, force: bool = False, quiet: bool = False) -> dict:
    """Write the data set, or keep the one that is there if it was written with the same options.

    Returns:
        The contents of ``metadata.json``.
    """
    metadata_file = root / "metadata.json"
    wanted = {"format": FORMAT, "options": asdict(options)}
    if metadata_file.is_file() and not force:
        found = json.loads(metadata_file.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            if not benchmarks_there(root, options.heldout_scenes, options.seed):
                make_benchmarks(root, heldout_scenes(options), options.seed)
            return found
    _clear(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / ".incomplete").touch()
    used: set[int] = set()
    asked: list[Question] = []
    bar = {"disable": quiet, "unit": " rows"}
    captions = caption_rows(options, root, used)
    rows = list(tqdm(captions, desc="captions", total=options.captions, **bar))
    _write_json(root / "pretrain/captions.json", rows)
    conversations = conversation_rows(options, root, used, asked)
    turns = list(tqdm(conversations, desc="conversations", total=options.conversations, **bar))
    _write_json(root / "finetune/conversations.json", turns)
    scenes, questions = _write_heldout(options, root, quiet)
    train_pool, held_pool = digit_pools()
    held = samples_of(scenes)
    if used & held or not used <= set(train_pool) or not held <= set(held_pool):
        raise AssertionError(f"training and held-out scenes share digit samples: {sorted(used & held)}")
    metadata = wanted | {
        "image_size": SIDE,
        "rows": {
            "captions": len(rows),
            "conversations": len(turns),
            "text_only": sum("image" not in row for row in turns),
            "two_images": sum(isinstance(row.get("image"), list) for row in turns),
            "heldout_questions": len(questions),
        },
        "digit_samples": {
            "source": "sklearn.datasets.load_digits",
            "split_seed": SPLIT_SEED,
            "train_pool": len(train_pool),
            "heldout_pool": len(held_pool),
            "train_used": len(used),
            "heldout_used": len(held),
            "shared": len(used & held),
            "heldout_indices": list(held_pool),
        },
        "categories": dict(sorted(Counter(q.category for q in questions).items())),
        "blind_baseline": blind_baseline(asked, questions),
    }
    make_benchmarks(root, scenes, options.seed)
    _write_json(metadata_file, metadata)
    (root / ".incomplete").unlink()
    return metadata


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data" / "mini")
    for name, default in asdict(Options()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}"
        )
    parser.add_argument("--force", action="store_true", help="write again even if the same data is there")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = vars(parser.parse_args(arguments))
    root, force, quiet = given.pop("out"), given.pop("force"), given.pop("quiet")
    metadata = make_data(Options(**given), root, force=force, quiet=quiet)
    rows, blind = metadata["rows"], metadata["blind_baseline"]["by_question"]["overall"]
    print(f"{root}: {rows['captions']} captions, {rows['conversations']} conversations, ", end="")
    print(f"{rows['heldout_questions']} held-out questions (answering without looking: {blind:.1%})")


if __name__ == "__main__":
    main()
