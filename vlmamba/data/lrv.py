"""LRV-Instruction in LLaVA's format: ``vlmamba data convert lrv``.

Its three files hold ``{"image_id", "question", "answer"}`` each (github.com/FuxiaoLiu/LRV-Instruction, download.txt);
prismatic-vlms (scripts/additional-datasets/lrv_instruct.py), which Cobra trained with, takes all of them, the charts
among them, and keeps the pictures in two folders beside the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmamba.common.files import read_json, replace_json
from vlmamba.errors import DataError, MissingFileError

PHOTOS = ("filter_cap1.json", "filter_cap_more1.json")
CHARTS = "chart_release_update.json"
PHOTO_FOLDER, CHART_FOLDER = "lrv-vg", "lrv-chart"
GET = (
    "Get the three annotation files and the two archives of pictures from github.com/FuxiaoLiu/LRV-Instruction "
    f"(download.txt); the pictures of Visual Genome go to {PHOTO_FOLDER}/ beside the files, the charts to "
    f"{CHART_FOLDER}/."
)


def convert_lrv(folder: str | Path, output: str | Path) -> int:
    """Write the rows of LRV-Instruction as one LLaVA file; the pictures' paths start at the folder's parent.

    Args:
        folder: With its three annotation files.
        output: JSON file to write.

    Returns:
        The number of rows; 342,799 of the files that prismatic-vlms used.

    Raises:
        MissingFileError: One of the files is not there.
        DataError: An entry is of another kind; names file and entry.
    """
    folder = Path(folder)
    missing = [name for name in (*PHOTOS, CHARTS) if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(f"{folder} lacks {', '.join(missing)}. {GET}")
    rows = [row for name in PHOTOS for row in _rows(folder / name, PHOTO_FOLDER, ".jpg")]
    rows += _rows(folder / CHARTS, CHART_FOLDER, "")
    replace_json(output, rows, indent=None)
    return len(rows)


def _rows(file: Path, pictures: str, suffix: str) -> Iterator[dict[str, Any]]:
    entries = read_json(file, error=DataError)
    if not isinstance(entries, list):
        raise DataError(f"{file}: expected a list of entries, got {type(entries).__name__}.")
    for number, entry in enumerate(entries):
        try:
            image = f"{entry['image_id']}{suffix}"
            question, answer = entry["question"].strip(), entry["answer"].strip()
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{file}, entry {number}: expected image_id, and question and answer as texts, got {str(entry)[:200]}"
            ) from error
        yield {
            "id": Path(image).stem,
            "image": f"{file.parent.resolve().name}/{pictures}/{image}",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }
