"""Where rows come from: LLaVA's files here, Hugging Face datasets and tar shards in files of their own. Another kind
implements `vlmamba.data.types.Source`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmamba.common.vocabulary import ImageRef
from vlmamba.data.conversation import OrphanTokens, parse_row
from vlmamba.data.downloads import missing_file_message
from vlmamba.data.index import RowFile
from vlmamba.data.types import Sample, Source, Stream, row_errors
from vlmamba.errors import ImageError, MissingFileError
from vlmamba.registry import Registry

SOURCES: Registry[type] = Registry("data source")
SOURCES.add("llava", "vlmamba.data.sources:LLaVASource")
SOURCES.add("hf", "vlmamba.data.huggingface:HuggingFaceSource")
SOURCES.add("webdataset", "vlmamba.data.shards:ShardSource")

STREAMS: Registry[type] = Registry("data stream")
STREAMS.add("hf", "vlmamba.data.huggingface:HuggingFaceStream")
STREAMS.add("webdataset", "vlmamba.data.shards:ShardStream")

_DRIVE = re.compile(r"^[A-Za-z]:")


def resolve_image_path(root: Path, name: str, *, allow_symlinks: bool = True) -> Path:
    """The file that an annotation row means; backslashes count as slashes.

    The check is made on names: ``..`` cannot leave the root, whatever the disk looks like. Symbolic links
    inside the root are followed by default, because image folders are commonly linked from other disks.

    Args:
        root: The image root.
        name: The path in the row, relative to the root (an absolute path inside the root is accepted).
        allow_symlinks: False: the file's real path must be inside the root's real path too.

    Raises:
        ImageError: The path leaves the root, is a URL, or is no path.
    """
    if "\0" in name or not name.strip():
        raise ImageError(f"image path {name!r} is not a path")
    if "://" in name:
        raise ImageError(
            f"image path {name!r} is an address; download the image and give its path under {root}"
        )
    slashed = name.replace("\\", "/")
    if _DRIVE.match(slashed) or slashed.startswith("//"):
        raise ImageError(
            f"image path {name!r} is an absolute Windows path; write it relative to the image root {root}"
        )
    base = os.path.normpath(root.absolute())
    resolved = os.path.normpath(os.path.join(base, slashed))  # noqa: PTH118 (normpath has no pathlib form)
    if not _inside(resolved, base):
        raise ImageError(
            f"image path {name!r} leaves its root: it means {resolved}, which is outside {base}. "
            "Write it relative to the root, or move the root up"
        )
    if not allow_symlinks:
        real, real_base = os.path.realpath(resolved), os.path.realpath(base)
        if not _inside(real, real_base):
            raise ImageError(
                f"image path {name!r} leaves its root through a link: it means {real}, outside {real_base}"
            )
    return Path(resolved)


def _inside(path: str, base: str) -> bool:
    return path.startswith(base.rstrip(os.sep) + os.sep)


def sample_of(
    row: object,
    images: Sequence[ImageRef],
    *,
    source: str,
    number: int,
    where: str,
    orphan_tokens: OrphanTokens,
) -> Sample:
    """A sample of a row whose images are at hand.

    Args:
        row: As `vlmamba.data.conversation.parse_row` takes it; what it says about its images is not looked at.
        images: All its images, in order.
        source, number, where: Name of the source, number of the row, its place.
        orphan_tokens: See `parse_row`.

    Raises:
        RowError: The row is wrong, with its place and id.
    """
    row_id = _id_of(row)
    if isinstance(row, Mapping):
        row = {**row, "image": None, "images": [str(i) for i in range(len(images))]}
    with row_errors(where, row_id):
        conversation = parse_row(row, orphan_tokens=orphan_tokens)
    shown = tuple(images[int(name)] for name in conversation.images)
    return Sample(row_id, conversation.messages, shown, source, number, where, conversation.events)


def read_row(source: Source, row: int) -> Sample:
    """A row of a source; whatever the source raises for it is a `RowError`."""
    with row_errors(f"{source.name}:row {row}"):
        return source[row]


def _id_of(row: object) -> str | int | None:
    value = row.get("id") if isinstance(row, Mapping) else None
    return value if isinstance(value, str | int) else None


class LLaVASource:
    """A LLaVA annotation file (a JSON list, or JSON lines) and the folder its image paths are relative to.

    Rows are ``{"id": ..., "image": path | [paths] | absent, "conversations": [...]}``; other keys are
    ignored. Rows stay on disk and are checked when asked for; image files are named here and opened by the
    dataset.

    Args:
        annotations: The annotation file.
        image_root: The folder of the images; may be left out when no row has an image.
        name: A name for logs (default: the file's stem).
        orphan_tokens: See `vlmamba.data.conversation.parse_row`.
        allow_symlinks: See `resolve_image_path`.
        hint: Where the files can be had, for the message when they are missing.

    Raises:
        MissingFileError: The annotation file or the image root is not there.
        DataError: The file is not a list of rows.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        image_root: str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        orphan_tokens: OrphanTokens = "reject",
        allow_symlinks: bool = True,
        hint: str = "",
    ) -> None:
        self.rows = RowFile(annotations, hint)
        self.name = name or self.rows.path.stem
        self.image_root = None if image_root is None else Path(image_root).expanduser().absolute()
        if self.image_root is not None and not self.image_root.is_dir():
            raise MissingFileError(missing_file_message(self.image_root, "the image root", hint))
        self.orphan_tokens: OrphanTokens = orphan_tokens
        self.allow_symlinks = allow_symlinks

    @property
    def fingerprint(self) -> str:
        """Changes when the annotation file, or how its rows are read, changes."""
        return f"llava:{self.rows.fingerprint}:{self.orphan_tokens}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        """Row number `row`.

        Raises:
            RowError: The row is wrong; the message has the file, the row or line, the id and what is wrong.
        """
        if not 0 <= row < len(self.rows):
            raise IndexError(f"row {row} of {self.name}, which has {len(self.rows)}")
        where = self.rows.where(row)
        with row_errors(where):
            data = self.rows[row]
        row_id = _id_of(data)
        with row_errors(where, row_id):
            conversation = parse_row(data, orphan_tokens=self.orphan_tokens)
            paths = tuple(self._resolve(name) for name in conversation.images)
        return Sample(row_id, conversation.messages, paths, self.name, row, where, conversation.events)

    def _resolve(self, name: str) -> Path:
        if self.image_root is None:
            raise ImageError(f"the row names the image {name!r} but the source has no image_root; set it")
        return resolve_image_path(self.image_root, name, allow_symlinks=self.allow_symlinks)


def build_source(kind: str = "llava", **options: object) -> Source:
    """A source by the name of its kind ("llava", "hf", "webdataset") and its constructor's options.

    Raises:
        ConfigError: The kind is unknown.
    """
    source: Source = SOURCES.get(kind)(**options)
    return source


def build_stream(kind: str, **options: object) -> Stream:
    """As `build_source`, of what is read from beginning to end ("hf", "webdataset")."""
    stream: Stream = STREAMS.get(kind)(**options)
    return stream
