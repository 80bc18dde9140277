"""WebDataset shards as sources: tar files whose members of one name are a sample.

    000123.jpg  000123.json             a row in LLaVA's format (or messages), its pictures beside it
    000124.jpg  000124.txt              a picture and its caption (img2dataset's layout)
    000125.0.png  000125.1.png  000125.json

The name of a sample is that of its members up to the first dot; members of a sample follow one another (webdataset's
convention, https://github.com/webdataset/webdataset#the-webdataset-format). Pictures belong to the row in the order
of the file.

`ShardSource` finds the members of shards on disk once, keeps where they are, and reads any row directly: with lengths
known ahead, packing, grouping and exact resuming work as for other files. `ShardStream` reads shards from beginning to
end, from anywhere `fsspec` reaches.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vlmamba.common.images import MAX_BYTES
from vlmamba.common.vocabulary import StoredImage
from vlmamba.data.cache import file_key, kept_table
from vlmamba.data.conversation import OrphanTokens
from vlmamba.data.downloads import missing_file_message
from vlmamba.data.sources import sample_of
from vlmamba.data.types import RowError, Sample, row_errors
from vlmamba.errors import DataError, MissingFileError, require

TEXTS = ("json", "txt", "caption")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "img")
VIDEOS = ("mp4", "webm", "avi", "mov", "mkv")
_KINDS = TEXTS + PICTURES + VIDEOS
_VERSION = 2
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shard_names(pattern: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The shards a pattern means, in order.

    Args:
        pattern: A tar file, a folder of them, a glob (``shards/*.tar``), webdataset's numbering
            (``shards/{00000..00127}.tar``), or a list of those.
    """
    if not isinstance(pattern, str | os.PathLike):
        return [name for part in pattern for name in shard_names(part)]
    text = str(pattern)
    if found := _BRACES.search(text):
        first, last = found.groups()
        names = [
            f"{text[: found.start()]}{number:0{len(first)}}{text[found.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
        return [name for part in names for name in shard_names(part)]
    if "://" in text:
        return [text]
    path = Path(text).expanduser()
    if path.is_dir():
        return sorted(str(file) for file in path.glob("*.tar"))
    if glob.has_magic(text):
        return sorted(glob.glob(str(path)))  # noqa: PTH207 (a pattern may be absolute)
    return [str(path)]


class _Shards:
    """Tar shards.

    Args:
        annotations: See `shard_names`.
        name: A name for logs.
        orphan_tokens: See `vlmamba.data.conversation.parse_row`.
        hint: Where the shards can be had, for the message when they are missing.

    Raises:
        MissingFileError: There is no such shard.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        name: str | None = None,
        orphan_tokens: OrphanTokens = "reject",
        hint: str = "",
        image_root: object = None,  # pictures are in the shards; for the likeness to other sources
    ) -> None:
        self.shards = _existing(annotations, hint)
        self.name = name or Path(self.shards[0]).absolute().parent.name
        self.orphan_tokens: OrphanTokens = orphan_tokens


class ShardSource(_Shards):
    """On disk, with random access; members are looked for once.

    Raises:
        DataError: A shard is no tar file, is cut off, or is compressed.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.paths = [Path(shard).absolute() for shard in self.shards]
        self._members = [_members(path) for path in self.paths]
        counts = [int(table[-1, 0]) + 1 if len(table) else 0 for table in self._members]
        self._ends = np.cumsum(counts)
        self._first = [
            np.searchsorted(t[:, 0], np.arange(n + 1)) for t, n in zip(self._members, counts, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """Changes when a shard, or how its rows are read, changes."""
        return f"webdataset:{[file_key(path) for path in self.paths]}:{self.orphan_tokens}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Sample:
        """Row number `row`, counted through all shards.

        Raises:
            RowError: The row is wrong.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        local = row - (int(self._ends[shard - 1]) if shard else 0)
        first, last = self._first[shard][local : local + 2]
        path = self.paths[shard]
        key = _key_at(path, int(self._members[shard][first, 2]))
        members = [
            (_KINDS[kind], partial(_read, path, offset, size))
            for _, kind, _, offset, size in self._members[shard][first:last].tolist()
        ]
        return _sample(members, key, self.name, row, f"{path}:{key}", self.orphan_tokens)


class ShardStream(_Shards):
    """Read from beginning to end; also compressed, and from addresses that `fsspec` reads."""

    @property
    def num_shards(self) -> int:
        """How many there are."""
        return len(self.shards)

    def read(self, shard: int, start: int = 0) -> Iterator[Sample | RowError]:
        """The rows of a shard from row `start` on; a row that cannot be used comes as its error.

        Raises:
            DataError: The shard is no tar file or is cut off.
        """
        fsspec = require("fsspec", extra="train", feature="streaming shards")
        name = self.shards[shard]
        try:
            with fsspec.open(name, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                for number, (key, members) in enumerate(
                    groupby(_files(tar), key=lambda m: _split(m.name)[0])
                ):
                    contents = []
                    for member in members:
                        if number < start:
                            continue
                        stream = tar.extractfile(member) if member.size <= MAX_BYTES else None
                        read = (
                            partial(_refuse, member.size) if stream is None else partial(bytes, stream.read())
                        )
                        contents.append((_split(member.name)[1], read))
                    if number >= start:
                        yield self._row(contents, key, number, f"{name}:{key}")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DataError(f"the shard {name} cannot be read: {error}. Get it again.") from error

    def count(self, shard: int) -> int:
        """The rows of a shard; of a plain tar file on disk only the headers are read."""
        name = self.shards[shard]
        if "://" not in name and name.endswith(".tar"):
            table = _members(Path(name))
            return int(table[-1, 0]) + 1 if len(table) else 0
        return sum(1 for _ in self.read(shard))

    def _row(self, members: list[tuple[str, Any]], key: str, number: int, where: str) -> Sample | RowError:
        try:
            return _sample(members, key, self.name, number, where, self.orphan_tokens)
        except RowError as error:
            return error


def _existing(annotations: Any, hint: str) -> list[str]:
    names = shard_names(annotations)
    if not names:
        raise MissingFileError(missing_file_message(Path(str(annotations)), "the shards", hint))
    for name in names:
        if "://" not in name and not Path(name).is_file():
            raise MissingFileError(missing_file_message(Path(name), "the shard", hint))
    return names


def _split(name: str) -> tuple[str, str]:
    """A member's sample and its kind: ``a/b.0.PNG`` is ``a/b`` and ``png``."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return folder + slash + stem, rest.rpartition(".")[2].lower()


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members that a sample is made of."""
    for member in tar:
        hidden = member.name.rpartition("/")[2].startswith(".")
        if member.isreg() and not hidden and _split(member.name)[1] in _KINDS:
            yield member
        tar.members.clear()  # type: ignore[attr-defined]  # TarFile keeps every header it has seen


def _members(path: Path) -> np.ndarray:
    """(members, 5) int64: row, kind, place of the header, place and size of the content."""
    return kept_table("shard", (_VERSION, *file_key(path)), partial(_find_members, path), columns=5)


def _find_members(path: Path) -> np.ndarray:
    found: list[tuple[int, ...]] = []
    row, last = -1, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _files(tar):
                key, kind = _split(member.name)
                row, last = (row, last) if key == last else (row + 1, key)
                found.append((row, _KINDS.index(kind), member.offset, member.offset_data, member.size))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"the shard {path} cannot be read: {error}. It is cut off, or not a plain tar file; compressed shards can "
            "only be streamed (data.stream)."
        ) from error
    size = path.stat().st_size
    if found and sum(found[-1][3:]) > size:
        raise DataError(
            f"the shard {path} is cut off: its last member ends after its {size} bytes. Get it again."
        )
    return np.array(found, dtype=np.int64).reshape(-1, 5)


def _read(path: Path, offset: int, size: int) -> bytes:
    if size > MAX_BYTES:
        return _refuse(size)
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, offset)


def _refuse(size: int) -> bytes:
    raise DataError(f"a member of {size} bytes is larger than the {MAX_BYTES} that are read")


def _key_at(path: Path, header: int) -> str:
    """The sample's name, from the header of its first member (long names have one of their own in front)."""
    with path.open("rb") as file:
        file.seek(header)
        with tarfile.TarFile(fileobj=file) as tar:
            member = tar.next()
    assert member is not None
    return _split(member.name)[0]


def _sample(
    members: Sequence[tuple[str, Any]],
    key: str,
    source: str,
    number: int,
    where: str,
    orphan_tokens: OrphanTokens,
) -> Sample:
    """A sample of its members: (kind, how to read it)."""
    images = [
        StoredImage(f"{kind} image {n} of {where}", read)
        for n, (kind, read) in enumerate((kind, read) for kind, read in members if kind in PICTURES)
    ]
    with row_errors(where, key):
        if any(kind in VIDEOS for kind, _ in members):
            raise RowError("the sample has a video, which no model here sees", kind="video")
        text = _one([read for kind, read in members if kind == "json"], "json")
        try:
            row: Any = {} if text is None else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RowError(f"its json is not valid: {error}") from error
        if isinstance(row, dict) and row.get("conversations") is None and row.get("messages") is None:
            caption = _one([read for kind, read in members if kind in ("txt", "caption")], "caption")
            if caption is not None and not images:
                raise RowError("the sample has a caption and no picture", kind="image")
            if caption is not None:
                words = caption.decode("utf-8", "surrogateescape").strip()
                question = {"role": "user", "content": "<image>" * len(images)}
                row = {"messages": [question, {"role": "assistant", "content": words}]}
        if isinstance(row, dict) and not isinstance(row.get("id"), str | int):
            row = {**row, "id": key}
        return sample_of(row, images, source=source, number=number, where=where, orphan_tokens=orphan_tokens)


def _one(found: Sequence[Any], what: str) -> bytes | None:
    if len(found) > 1:
        raise RowError(
            f"the sample has {len(found)} members that are its {what}; which is meant cannot be told"
        )
    return bytes(found[0]()) if found else None
