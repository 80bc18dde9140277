"""Data: sources of conversations with images, mixed, tokenised through a processor, planned, loaded.

The path of a row: `sources` (file to `Sample`) -> `conversation` (its irregularities) -> `mixture` (one index
space) -> `dataset` (tensors, bad rows replaced) -> `sampler` (plan of an epoch) -> `loader` (optimizer
steps). Nothing here
imports models: the processor is handed in (`vlmamba.data.types.Processor`).
"""

from __future__ import annotations

from vlmamba.data.checks import check, missing_folders, write_clean
from vlmamba.data.collate import MODEL_KEYS, collate
from vlmamba.data.conversation import parse_row, place_images
from vlmamba.data.dataset import VLDataset
from vlmamba.data.downloads import download_hint
from vlmamba.data.encode import SampleEncoder
from vlmamba.data.ledger import BadSamples
from vlmamba.data.lengths import LengthTable, compute_lengths
from vlmamba.data.loader import Loader, Step, StepLoader, build_loader
from vlmamba.data.mixture import Mixture
from vlmamba.data.packing import PACK_MULTIPLE, pack
from vlmamba.data.sampler import EpochPlan, PlanSettings, plan_epoch
from vlmamba.data.sources import LLaVASource, build_source, build_stream, resolve_image_path
from vlmamba.data.stream import StreamLoader, StreamSettings
from vlmamba.data.types import EVENTS, Processor, RowError, Sample, Source

__all__ = [
    "EVENTS",
    "MODEL_KEYS",
    "PACK_MULTIPLE",
    "BadSamples",
    "EpochPlan",
    "LLaVASource",
    "LengthTable",
    "Loader",
    "Mixture",
    "PlanSettings",
    "Processor",
    "RowError",
    "Sample",
    "SampleEncoder",
    "Source",
    "Step",
    "StepLoader",
    "StreamLoader",
    "StreamSettings",
    "VLDataset",
    "build_loader",
    "build_source",
    "build_stream",
    "check",
    "collate",
    "compute_lengths",
    "download_hint",
    "missing_folders",
    "pack",
    "parse_row",
    "place_images",
    "plan_epoch",
    "resolve_image_path",
    "write_clean",
]
