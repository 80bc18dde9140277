"""Where the files of the usual LLaVA layout come from, for the messages about missing ones.

Layout and addresses: README of LLaVA, section "Visual Instruction Tuning", and docs/Data.md there.
"""

from __future__ import annotations

from pathlib import Path

_PRETRAIN = "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain"
_VISUAL_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2/"

_HINTS: tuple[tuple[str, str], ...] = (
    ("blip_laion_cc_sbu_558k", _PRETRAIN),
    ("llava_v1_5_mix665k", "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"),
    ("LLaVA-Pretrain", f"{_PRETRAIN} (images.zip, unpacked into LLaVA-Pretrain/images)"),
    ("coco/train2017", "http://images.cocodataset.org/zips/train2017.zip"),
    ("gqa/images", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"),
    ("ocr_vqa", "the OCR-VQA download script (https://ocr-vqa.github.io); images may be .jpg, .png or .gif"),
    ("textvqa/train_images", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"),
    ("vg/VG_100K_2", f"{_VISUAL_GENOME}images2.zip"),
    ("vg/VG_100K", f"{_VISUAL_GENOME}images.zip"),
)


def download_hint(path: str | Path) -> str | None:
    """Where a well-known file or folder can be had, or None when the name says nothing."""
    text = Path(path).as_posix()
    return next((hint for part, hint in _HINTS if part in text), None)


def missing_file_message(path: Path, what: str, hint: str = "") -> str:
    """The message for a missing annotation file or image root, with the way out."""
    hint = hint or download_hint(path) or ""
    existing = next((parent for parent in path.parents if parent.exists()), None)
    where = f" (the part that exists: {existing})" if existing is not None and existing != path.parent else ""
    way = f"Get it from {hint}, or set the path" if hint else "Set the path"
    return (
        f"{what} {path} does not exist{where}. {way} to where it is; to run without downloads, "
        "use the recipe of the playground (train/playground.py)."
    )
