"""Hugging Face data sets: from the hub, from parquet files, from folders that ``save_to_disk`` wrote.

Pictures stay undecoded and are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.errors import DataError, MissingFileError, require
from vlmamba.evaluation.layouts.files import HUB, Benchmark
from vlmamba.evaluation.task import StoredImage


def is_stored(place: Path | str) -> bool:
    """Whether `find_data` found a Hugging Face data set."""
    if isinstance(place, str):
        return True
    if place.is_dir():
        return (place / "state.json").is_file() or any(place.glob("*.parquet"))
    return place.suffix == ".parquet"


def read_stored(
    place: Path | str, benchmark: Benchmark, *, config: str | None, split: str, columns: Sequence[str]
) -> Any:
    """Open a data set; its column ``image`` is not decoded.

    Args:
        place: What `find_data` found.
        benchmark: Whose data.
        config: Configuration on the hub.
        split: Split; in local folders the parquet files whose names begin with it, or all.
        columns: What it must have.

    Returns:
        A `datasets.Dataset`.

    Raises:
        MissingFileError: The hub or the files cannot be read.
        DataError: A column is missing.
    """
    datasets = require("datasets", extra="eval", feature=f"the Hugging Face layout of {benchmark.title}")
    if isinstance(place, str):
        name = place.removeprefix(f"{HUB}:")
        try:
            rows = datasets.load_dataset(name, config, split=split)
        except (OSError, ValueError) as error:
            raise MissingFileError(
                f"the data set {name} ({config}, {split}) cannot be read: {error}"
            ) from error
    elif (place / "state.json").is_file():
        rows = datasets.load_from_disk(str(place))
    else:
        files = [place] if place.is_file() else sorted(place.glob("*.parquet"))
        files = [f for f in files if f.name.startswith(split)] or files
        rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], split="train")
    lacking = [name for name in columns if name not in rows.column_names]
    if lacking:
        raise DataError(
            f"{place} is no data set of {benchmark.title}: it lacks the column(s) {', '.join(lacking)}; it has "
            f"{', '.join(rows.column_names)}"
        )
    if "image" in rows.column_names:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    return rows


def stored_rows(rows: Any) -> list[dict[str, Any]]:
    """All rows without their pictures."""
    names = [name for name in rows.column_names if name != "image"]
    return rows.select_columns(names).to_list()


def stored_picture(rows: Any, index: int, name: str) -> StoredImage:
    """The picture of a row.

    Args:
        rows: A data set of `read_stored`.
        index: The row.
        name: Of the picture; rows that share a picture give the same.
    """

    def read() -> bytes:
        cell = rows[index]["image"]
        if cell is None:
            raise DataError(f"row {index} of the data set has no picture")
        return cell["bytes"] if cell.get("bytes") else Path(cell["path"]).read_bytes()

    return StoredImage(name, read)
