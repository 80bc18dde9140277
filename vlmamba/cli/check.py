"""``vlmamba check language``: is a language model the same model packed, padded, split, stepped and reloaded.

``vlmamba check run``: is every file of a run what was written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from logging import WARNING, getLogger
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  vlmamba check language checkpoints/mamba-130m     # a directory with weights
  vlmamba check language config.json                # a config: random weights
  vlmamba check language runs/quickstart/finetune   # the language model of a run or an export
  vlmamba check language --all                      # every known family, tiny: the table of docs/backbones.md
  vlmamba check run runs/quickstart/finetune        # or one of its checkpoints, or an export
"""


def run(words: Sequence[str]) -> int:
    """Run the verb; exit code 1 when a law is broken or a file is damaged."""
    parser = argparse.ArgumentParser(
        prog="vlmamba check",
        description="Try the laws that hold of a model here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    language = actions.add_parser(
        "language",
        help="packed == alone, padded == alone, split == whole, step == whole, reloaded == saved, causal, own logits",
        allow_abbrev=False,
    )
    language.add_argument("paths", nargs="*", metavar="PATH", help="directory, config.json, run or export")
    language.add_argument("--all", action="store_true", help="every known family at a tiny size")
    language.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    run_folder = actions.add_parser(
        "run",
        help="compare every file of a run, a checkpoint or an export with its digest",
        allow_abbrev=False,
    )
    run_folder.add_argument("folder", type=Path)
    arguments = parser.parse_args(words)
    if arguments.action == "run":
        return _run_folder(arguments.folder)
    if bool(arguments.paths) == arguments.all:
        parser.error("give the language models to check, or --all")
    return _language(arguments.paths, seed=arguments.seed)


def _run_folder(folder: Path) -> int:
    from vlmamba.training.check_run import check_run

    findings = check_run(folder)
    width = max(len(finding.file) for finding in findings)
    for finding in findings:
        print(f"{finding.file:<{width}}  {finding.size:>15,}  {finding.verdict}")
    damaged = sum(finding.damaged for finding in findings)
    print(f"\n{len(findings)} file(s), {damaged} damaged")
    return 1 if damaged else 0


def _language(paths: Sequence[str], *, seed: int) -> int:
    from vlmamba.errors import ConfigError
    from vlmamba.models.language.laws import Law, check_laws, reasons, refused, table

    results: list[tuple[str, Sequence[Law]]] = []
    with _quiet():
        for name, build in _models(paths, seed):
            try:
                model = build()
            except ConfigError as refusal:
                results.append((name, refused(str(refusal))))
            else:
                results.append((name, check_laws(model)))
    print(table(results))
    if notes := reasons(results):
        print(f"\n{notes}")
    broken = sum(law.verdict == "wrong" for _, laws in results for law in laws)
    print(f"\n{len(results)} language model(s), {broken} broken law(s)")
    return 1 if broken else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what loading and choosing say: the table is what is wanted."""
    from transformers.utils import logging

    getLogger("vlmamba").setLevel(WARNING)  # until the command ends
    theirs = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(theirs)
        logging.enable_progress_bar()


def _models(paths: Iterable[str], seed: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what builds the model of each."""
    from vlmamba.models.language import build_language_model
    from vlmamba.testing.families import TINY_FAMILIES, tiny_config

    for path in paths:
        yield Path(path).name, partial(_load, path, seed)
    if not paths:
        for name in TINY_FAMILIES:
            yield name, partial(_seeded, build_language_model, tiny_config(name), seed)


def _load(path: str, seed: int) -> Any:
    import torch

    from vlmamba.common.load import find_model, is_checkpoint, load_model
    from vlmamba.models.language import build_language_model, load_language_model, read_config
    from vlmamba.models.language.loading import read_config_dict, resolve_directory
    from vlmamba.models.language.weights import has_weights

    if Path(path).name == "config.json" and Path(path).is_file():
        return _seeded(build_language_model, read_config(Path(path).parent), seed)
    directory = Path(path) if is_checkpoint(Path(path)) else resolve_directory(path)
    if not (directory / "config.json").is_file():
        directory = find_model(directory)
    if is_checkpoint(directory) or read_config_dict(directory).get("model_type") == "vlmamba":
        return load_model(directory, dtype="float32")[0].language_model
    if not has_weights(directory):
        return _seeded(build_language_model, read_config(directory), seed)
    return load_language_model(directory, torch.float32)


def _seeded(build: Any, config: Any, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    return build(config).float()
