"""Our scorers beside the official ones, item by item: values that the official scripts gave on the stress sets."""

from __future__ import annotations

import pytest

from tests.evaluation.scorers import stress, stress_choice, stress_other, stress_yes_no
from vlmamba.evaluation import scorers
from vlmamba.evaluation.scorers.vqa import round_half_up


def column(items, key):
    return [item[key] for item in items]


def differing(ours, theirs, items):
    """Items on which two lists differ; an empty list is agreement."""
    pairs = zip(ours, theirs, items, strict=True)
    return [(a, b, item) for a, b, item in pairs if a != b]


# ---------------------------------------------------------------------------------------------- VQA family
@pytest.fixture(scope="module")
def vqa():
    return stress.vqa_items()


def vqav2(items, **options):
    types = {"answer_types": column(items, "answer_type"), "question_types": column(items, "question_type")}
    ids = column(items, "question_id")
    return scorers.vqav2(column(items, "prediction"), column(items, "answers"), ids=ids, **types, **options)


def test_vqav2_official(vqa):
    expected = stress.golden("vqav2", vqa)
    score = vqav2(vqa)
    assert differing([round_half_up(100 * c, 2) for c in score.correct], expected["eval_qa"], vqa) == []
    assert score.metrics["official"] == expected["accuracy"]
    normalised = [scorers.normalise_vqa(text) for text in column(vqa, "prediction")]
    assert differing(normalised, expected["normalised"], vqa) == []


def test_vqav2_rounds_as_python_2_does(vqa):
    for count, accuracy in stress.golden("vqav2", vqa)["accuracy_of_first"].items():
        assert vqav2(vqa[: int(count)]).metrics["official"] == accuracy


def test_vqa_family_lmms(vqa):
    expected = stress.golden("vqa_lmms", vqa)
    predictions, answers = column(vqa, "prediction"), column(vqa, "answers")
    assert differing(vqav2(vqa, style="lmms").correct, expected["vqav2"], vqa) == []
    assert (
        differing(scorers.vizwiz(predictions, answers, style="lmms").correct, expected["vizwiz"], vqa) == []
    )
    assert scorers.textvqa(predictions, answers).correct == pytest.approx(expected["textvqa"], abs=1e-12)
    styles = [vqav2(vqa, style=style).metrics["headline"]["value"] for style in ("official", "lmms")]
    assert styles[1] > styles[0] + 1  # the shortcut for unanimous answers matters on this set


def test_textvqa(vqa):
    expected = stress.golden("textvqa", vqa)
    score = scorers.textvqa(column(vqa, "prediction"), column(vqa, "answers"))
    assert differing(score.correct, expected["credit"], vqa) == []
    assert differing(score.parsed, expected["processed"], vqa) == []
    assert score.metrics["overall"]["accuracy"] == expected["accuracy"]
    assert f"{score.metrics['official']['accuracy']:.2f}" == expected["printed"]


def test_vizwiz(vqa):
    expected = stress.golden("vizwiz", vqa)
    predictions, answers = column(vqa, "prediction"), column(vqa, "answers")
    options = {"answer_types": column(vqa, "answer_type"), "answerable": column(vqa, "answerable")}
    score = scorers.vizwiz(predictions, answers, **options)
    assert differing([round(100 * c, 2) for c in score.correct], expected["eval_qa"], vqa) == []
    assert differing(score.parsed, expected["normalised"], vqa) == []
    assert score.metrics["official"] == {
        "overall": expected["overall"],
        "perAnswerType": expected["per_answer_type"],
        "unanswerability": expected["unanswerability"],
    }
    llava = scorers.vizwiz(predictions, answers, **options, style="llava")
    assert differing([round(100 * c, 2) for c in llava.correct], expected["llava"]["eval_qa"], vqa) == []
    assert llava.metrics["official"]["overall"] == expected["llava"]["overall"]
    assert llava.metrics["official"]["unanswerability"] == expected["llava"]["unanswerability"]
    assert llava.correct != score.correct


# ------------------------------------------------------------------------------------------------------ GQA
@pytest.mark.parametrize("style", ["llava", "raw"])
def test_gqa(style):
    data = stress_other.gqa_items()
    expected = stress.golden("gqa", data)[style]
    score = scorers.gqa(
        data["texts"], data["questions"], choices=data["choices"], consistency=True, style=style
    )
    official = score.metrics["official"]
    for name in ("accuracy", "binary", "open", "validity", "plausibility", "consistency", "distribution"):
        assert official[name] == expected[name], name
    for name in ("StructuralType", "SemanticType", "Steps", "Length"):
        shares, table = official[f"accuracyPer{name}"], expected[f"accuracyPer{name}"]
        assert shares == {kind: value for kind, (value, _) in table.items()}
    counts = {kind: row["total"] for kind, row in score.metrics["structural"].items()}
    assert counts == {kind: count for kind, (_, count) in expected["accuracyPerStructuralType"].items()}


def test_gqa_conversion_and_prismatic():
    data = stress_other.gqa_items()
    expected = stress.golden("gqa", data)
    assert [scorers.gqa_prediction(text) for text in data["texts"].values()] == expected["converted"]
    score = scorers.gqa(data["texts"], data["questions"], style="prismatic")
    for name, value in expected["prismatic"].items():
        shares = {kind: v for kind, (v, _) in value.items()} if isinstance(value, dict) else value
        assert score.metrics["official"][name] == shares, name


# ----------------------------------------------------------------------------------------------------- POPE
def pope(items, **options):
    splits, ids = column(items, "split"), column(items, "question_id")
    return scorers.pope(column(items, "text"), column(items, "label"), splits, ids=ids, **options)


def test_pope_official():
    items = stress_yes_no.pope_items()
    expected = stress.golden("pope", items)
    score = pope(items)
    assert differing(score.parsed, expected["read"], items) == []
    assert score.metrics["official"] == expected["official"]
    assert score.metrics["mean"]["f1"] == pytest.approx(
        sum(t["F1 score"] for t in expected["official"].values()) / 3
    )


def test_pope_elsewhere():
    items = stress_yes_no.pope_items()
    expected = stress.golden("pope", items)
    lmms = pope(items, style="lmms").metrics
    for name, values in expected["lmms"].items():
        table = lmms["pooled"] if name == "pooled" else lmms["splits"][name]
        assert {**values, "f1": values["f1_score"]} == {
            "f1_score": table["f1"],
            **{k: table[k] for k in _POPE},
        }
    kit = pope(items, style="vlmevalkit")
    assert differing([(r or "unknown").title() for r in kit.parsed], expected["vlmevalkit_read"], items) == []
    for name, values in expected["vlmevalkit"].items():
        table = kit.metrics["pooled"] if name == "Overall" else kit.metrics["splits"][name]
        ours = {"Overall": table["f1"], "acc": table["accuracy"], "precision": table["precision"]}
        assert {k: 100 * v for k, v in ours.items()} | {"recall": 100 * table["recall"]} == pytest.approx(
            values
        )


_POPE = ("accuracy", "precision", "recall", "f1", "yes_ratio")


# ------------------------------------------------------------------------------------------------------ MME
def mme(items, **options):
    columns = (column(items, key) for key in ("text", "label", "category", "image"))
    return scorers.mme(*columns, **options)


def test_mme_official():
    items = stress_yes_no.mme_items()
    expected = stress.golden("mme", items)
    score = mme(items)
    assert differing(score.parsed, expected["read"], items) == []
    for kind, values in expected["official"].items():
        assert score.metrics["official"][kind] == {**values, "absent": []}
    assert score.metrics["headline"]["value"] == expected["official"]["Perception"]["total"]


def test_mme_elsewhere():
    items = stress_yes_no.mme_items()
    expected = stress.golden("mme", items)
    lmms = mme(items, style="lmms")
    assert differing(lmms.parsed, expected["lmms_read"], items) == []
    for kind, total in expected["lmms"].items():
        assert lmms.metrics["official"][kind]["total"] == pytest.approx(total, abs=1e-9)
    kit = mme(items, style="vlmevalkit").metrics["official"]
    assert kit["Perception"]["total"] == pytest.approx(expected["vlmevalkit"]["perception"], abs=1e-9)
    assert kit["Cognition"]["total"] == pytest.approx(expected["vlmevalkit"]["reasoning"], abs=1e-9)


# -------------------------------------------------------------------------------------------------- MMBench
def test_mmbench():
    rows = stress_choice.mmbench_rows()
    expected = stress.golden("mmbench", rows)
    columns = (column(rows, key) for key in ("text", "index", "options", "answer"))
    levels = {"categories": column(rows, "category"), "l2_categories": column(rows, "l2")}
    score = scorers.mmbench(*columns, **levels, splits=column(rows, "split"))
    assert differing(score.parsed, expected["letters"], rows) == []
    assert differing([int(ok) for ok in score.correct], expected["vanilla"], rows) == []
    assert score.metrics["official"] == expected["official"]
    hits: dict[int, bool] = {}
    for question, ok in zip(score.groups, score.correct, strict=True):
        hits[question] = hits.get(question, True) and ok
    assert {str(question): int(ok) for question, ok in hits.items()} == expected["hits"]
    assert score.metrics["overall"]["correct"] == sum(expected["hits"].values())
    assert score.metrics["overall"]["accuracy"] < score.metrics["vanilla_main"]["accuracy"] - 0.1


def test_mmbench_letters_of_lmms():
    rows = stress_choice.mmbench_rows()
    expected = stress.golden("mmbench", rows)["lmms_letters"]
    letters = [scorers.mmbench_letter(row["text"], row["options"], "lmms") for row in rows]
    assert differing(letters, expected, rows) == []


# ------------------------------------------------------------------------------------------------ ScienceQA
def test_scienceqa():
    items = stress_choice.scienceqa_items()
    expected = stress.golden("scienceqa", items)
    score = scorers.scienceqa(column(items, "text"), items, ids=column(items, "id"))
    assert differing([letter or "FAILED" for letter in score.parsed], expected["parsed"], items) == []
    assert differing(
        list(score.correct), [i == item["answer"] for i, item in zip(expected["index"], items, strict=True)], items
    ) == []  # fmt: skip
    official = score.metrics["official"]
    assert {key: official[key] for key in ("acc", "correct", "count")} == {
        key: expected[key] for key in ("acc", "correct", "count")
    }
    total, right = official["count"], official["correct"]
    assert expected["printed"] == (
        f"Total: {total}, Correct: {right}, Accuracy: {official['acc']:.2f}%, "
        f"IMG-Accuracy: {official['img_acc']:.2f}%"
    )
    assert {key: value for key, value in official.items() if key in expected["table"]} == expected["table"]
    assert score.metrics["missing"] == sum(item["text"] is None for item in items) > 0
    assert (
        official["img_acc"] / 100 > score.metrics["img"]["accuracy"]
    )  # missing answers keep our denominator


def test_scienceqa_lmms():
    items = [item for item in stress_choice.scienceqa_items() if item["text"] is not None]
    theirs = [c for c in stress.golden("scienceqa", stress_choice.scienceqa_items())["lmms"] if c is not None]
    score = scorers.scienceqa(column(items, "text"), items, style="lmms")
    assert differing([float(ok) for ok in score.correct], theirs, items) == []


# --------------------------------------------------------------------------------------------------- MM-Vet
@pytest.mark.parametrize("runs", [1, 5])
def test_mm_vet(runs):
    data = stress_other.mm_vet_items()
    expected = stress.golden("mm_vet", data)[f"runs_{runs}"]
    official = scorers.mm_vet(data["grades"], data["questions"], runs=runs).metrics["official"]
    assert official.pop("runs") == expected["runs"]
    assert official.pop("integrations") == expected["integrations"]
    assert official == expected["capabilities"]


# ---------------------------------------------------------------------------------- Hateful Memes, sarcasm
@pytest.mark.parametrize("name", sorted(stress_yes_no.score_items()))
def test_scores_of_two_classes(name):
    sets = stress_yes_no.score_items()
    expected = stress.golden("scores", sets)["sets"][name]
    scores, labels = column(sets[name], "score"), column(sets[name], "label")
    sarcasm = scorers.sarcasm(scores, labels).metrics
    assert [sarcasm["counts"][key] for key in ("tp", "fp", "tn", "fn")] == expected["counts"]
    assert sarcasm["official"] == pytest.approx(
        {key: expected[key] for key in sarcasm["official"]}, abs=1e-15
    )
    memes = scorers.hateful_memes(scores, labels).metrics["official"]
    assert memes["accuracy"] == expected["accuracy_sklearn"]
    assert memes["auroc"] == pytest.approx(expected["auroc"], abs=1e-12)
    area = scorers.average_precision(scores, labels)
    assert area == pytest.approx(expected["average_precision"], abs=1e-12)
