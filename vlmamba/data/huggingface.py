"""Hugging Face datasets as sources, by row or from beginning to end.

Conversations are in a column ``conversations`` (LLaVA's turns) or ``messages`` (roles and contents), images in
``image`` or ``images``: pictures stored in the table, or paths below an image root. Rows are read from the memory
mapped table without copying its pictures, so measuring the texts of a million rows touches no image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmamba.common.vocabulary import ImageRef, StoredImage
from vlmamba.data.conversation import OrphanTokens
from vlmamba.data.sources import resolve_image_path, sample_of
from vlmamba.data.types import RowError, Sample, row_errors
from vlmamba.errors import DataError, ImageError, MissingFileError, require

TEXT_COLUMNS = ("conversations", "messages")
IMAGE_COLUMNS = ("image", "images")
OTHER_COLUMNS = ("id", "loss", "weight", "video", "videos", "audio", "audios")
"""What else of a row has a meaning (`vlmamba.data.conversation`)."""


class _HuggingFace:
    """A data set of the `datasets` library.

    Args:
        annotations: A name on the hub, a folder of ``save_to_disk``, a folder of parquet files, or a
            `datasets.Dataset` (to be streamed, also an `IterableDataset`).
        image_root: Where image paths start from, when the table holds paths.
        name: A name for logs.
        split: Which split.
        subset: The configuration of a data set on the hub that has several.
        orphan_tokens: See `vlmamba.data.conversation.parse_row`.
        hint: Where it can be had, for the message when it is missing.

    Raises:
        MissingFileError: It is neither here nor on the hub.
        DataError: It has no column of conversations, or several splits and not the one asked for.
    """

    streaming = False

    def __init__(
        self,
        annotations: Any,
        image_root: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        split: str = "train",
        subset: str | None = None,
        orphan_tokens: OrphanTokens = "reject",
        hint: str = "",
    ) -> None:
        dataset = _open(annotations, split, subset, hint, streaming=self.streaming)
        of_files = isinstance(annotations, str | os.PathLike)
        self.name = name or (Path(annotations).name if of_files else "dataset")
        if dataset.column_names is None:
            dataset = dataset._resolve_features()
        self.columns = _Columns(dataset.column_names, self.name, image_root)
        self.orphan_tokens: OrphanTokens = orphan_tokens
        self._dataset = dataset.select_columns(self.columns.needed)

    def _sample(self, values: Mapping[str, Any], images: list[ImageRef], row: int, where: str) -> Sample:
        return sample_of(
            self.columns.row(values),
            images,
            source=self.name,
            number=row,
            where=where,
            orphan_tokens=self.orphan_tokens,
        )


class HuggingFaceSource(_HuggingFace):
    """With random access."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._dataset = self._dataset.with_format("arrow")

    @property
    def fingerprint(self) -> str:
        """Changes when the data set, or how its rows are read, changes."""
        return f"hf:{self._dataset._fingerprint}:{self.orphan_tokens}"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Sample:
        """Row number `row`.

        Raises:
            RowError: The row is wrong.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)}")
        table = self._dataset[row]
        where = f"{self.name}:row {row}"
        values = {key: table.column(key)[0].as_py() for key in self.columns.plain}
        columns = [table.column(key)[0] for key in self.columns.images]
        # Of the scalars of a table only lists have values, and structures keys.
        lists = [
            list(cell) if cell.is_valid and hasattr(cell, "values") and not hasattr(cell, "keys") else [cell]
            for cell in columns
        ]
        cells = self.columns.pictures([[cell for cell in cells if cell.is_valid] for cells in lists])
        images = [self._image(cell, f"image {n} of {where}", where) for n, cell in enumerate(cells)]
        return self._sample(values, images, row, where)

    def _image(self, cell: Any, what: str, where: str) -> ImageRef:
        """A struct of bytes and path, or a path."""
        if not hasattr(cell, "keys"):
            return self.columns.path(cell.as_py(), where)
        if "bytes" in cell and cell["bytes"].is_valid:
            return StoredImage(what, cell["bytes"].as_py)
        return self.columns.path(cell["path"].as_py() if "path" in cell else None, where)


class HuggingFaceStream(_HuggingFace):
    """Read from beginning to end, a shard (a file of it) at a time."""

    streaming = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._dataset = self._dataset.decode(False)
        self.num_shards = int(self._dataset.num_shards)

    def read(self, shard: int, start: int = 0) -> Iterator[Sample | RowError]:
        """The rows of a shard from row `start` on; a row that cannot be used comes as its error."""
        rows = self._dataset.shard(num_shards=self.num_shards, index=shard)
        for number, row in enumerate(rows.skip(start) if start else rows, start=start):
            where = f"{self.name}:shard {shard}, row {number}"
            try:
                with row_errors(where):
                    columns = [row.get(key) for key in self.columns.images]
                    lists = [value if isinstance(value, list) else [value] for value in columns]
                    values = self.columns.pictures([[v for v in some if v is not None] for some in lists])
                    sample = self._sample(row, [self._image(value, where) for value in values], number, where)
            except RowError as error:
                yield error
            else:
                yield sample

    def count(self, shard: int) -> int:
        """The rows of a shard; images are not read."""
        texts = self._dataset.select_columns(self.columns.plain)
        return sum(1 for _ in texts.shard(num_shards=self.num_shards, index=shard))

    def _image(self, value: Any, where: str) -> ImageRef:
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            value = value.get("path")
        return self.columns.path(value, where)


class _Columns:
    """Which columns are read, and how."""

    def __init__(self, names: list[str], source: str, image_root: str | os.PathLike[str] | None) -> None:
        self.texts = [key for key in TEXT_COLUMNS if key in names]
        if not self.texts:
            raise DataError(
                f"the data set {source} has no column 'conversations' or 'messages'; its columns are "
                f"{sorted(names)}. Rename one with datasets' rename_column."
            )
        self.images = [key for key in IMAGE_COLUMNS if key in names]
        self.plain = [*self.texts, *(key for key in OTHER_COLUMNS if key in names)]
        self.needed = [*self.plain, *self.images]
        self.image_root = None if image_root is None else Path(image_root).expanduser().absolute()

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All but the pictures. Older files store a list of turns as one dictionary of lists."""
        row = {key: values.get(key) for key in self.plain}
        for key in self.texts:
            turns = row[key]
            if isinstance(turns, Mapping) and all(isinstance(column, list) for column in turns.values()):
                row[key] = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
        return row

    def pictures(self, columns: list[list[Any]]) -> list[Any]:
        """Those of the one column that has any."""
        filled = [cells for cells in columns if cells]
        if len(filled) > 1:
            raise RowError("the row has pictures under both 'image' and 'images'")
        return filled[0] if filled else []

    def path(self, value: object, where: str) -> Path:
        """The file a path of the table means."""
        if not isinstance(value, str):
            raise RowError("an image has neither bytes nor a path", where, kind="image")
        if self.image_root is None:
            raise RowError(
                f"the row names the image {value!r} but the source has no image_root; set it",
                where,
                kind="image",
            )
        try:
            return resolve_image_path(self.image_root, value)
        except ImageError as error:
            raise RowError(str(error), where, kind="image") from error


def _open(annotations: Any, split: str, subset: str | None, hint: str, *, streaming: bool) -> Any:
    """A `Dataset` or `IterableDataset`."""
    datasets = require("datasets", extra="train", feature="reading Hugging Face datasets")
    if not isinstance(annotations, str | os.PathLike):
        return annotations
    folder = Path(annotations).expanduser()
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(str(folder))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise DataError(f"{folder} has the splits {sorted(dataset)}, not {split!r}; set split")
            dataset = dataset[split]
        return dataset.to_iterable_dataset(num_shards=_shards(dataset)) if streaming else dataset
    try:
        return datasets.load_dataset(str(annotations), subset, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        get = f" Get it from {hint}." if hint else ""
        raise MissingFileError(
            f"the data set {annotations} cannot be opened ({type(error).__name__}: {error}).{get} It is a name on the "
            "hub, a folder written by save_to_disk, or a folder of parquet files."
        ) from error


def _shards(dataset: Any) -> int:
    """So many pieces that each has rows enough to be worth a reader of its own."""
    return max(1, min(1024, len(dataset) // 64))
