from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmamba.evaluation import Task, load_task
from vlmamba.evaluation.predictions import score_predictions

EVAL = Path(__file__).parents[3] / "eval"


class Files:
    """Writes benchmark files under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _at(self, name: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def json(self, name: str, value: Any) -> Path:
        path = self._at(name)
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path

    def lines(self, name: str, rows: list[dict]) -> Path:
        path = self._at(name)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    def table(self, name: str, rows: list[dict]) -> Path:
        path = self._at(name)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        return path

    def text(self, name: str, text: str) -> Path:
        path = self._at(name)
        path.write_text(text, encoding="utf-8")
        return path

    def parquet(self, name: str, columns: dict[str, list]) -> Path:
        """A data set with the column ``image`` as encoded pictures, as the hub has it."""
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_dict(columns)
        if "image" in columns:
            rows = rows.cast_column("image", datasets.Image())
        path = self._at(name)
        rows.to_parquet(path)
        return path


@pytest.fixture()
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture()
def load() -> Callable[..., Task]:
    def load(name: str, annotations: Any = None, **options: Any) -> Task:
        return load_task(
            name, folder=EVAL, annotations=None if annotations is None else str(annotations), **options
        )

    return load


@pytest.fixture()
def score() -> Callable[..., dict]:
    def score(name: str, predictions: Any, annotations: Any = None, **options: Any) -> dict:
        return score_predictions(name, predictions, annotations, folder=EVAL, **options)

    return score


@pytest.fixture(autouse=True)
def no_data_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found in the usual folders."""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="session")
def png() -> bytes:
    """The bytes of a small picture."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()
