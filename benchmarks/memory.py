"""Memory of each process under every strategy, measured with processes on a CPU, beside what `vlmamba plan` says.

    python benchmarks/memory.py                                        # two processes, every strategy that is installed
    python benchmarks/memory.py --nproc 4 --strategies ddp,fsdp2-full --precision bf16
    python benchmarks/memory.py --size 130m --strategies ddp,fsdp2     # 130M parameters; 2 GB a process and more

Stage 2 (connector and language model train, the encoder is frozen) with random weights. Counted is what malloc has
handed out since before the model: between steps, before an update (with the gradients), and at most after any operation
of a step. RSS is the operating system's peak of the process during that step, less what it had before the model.
DeepSpeed's buckets are made as small as the model: those of train/deepspeed/ take 0.8 and 1.6 GB whatever the model.

Needs nothing but the package; zero2 and zero3 need DeepSpeed (``DS_BUILD_OPS=0 pip install deepspeed``).
Shapes: B rows, L length.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmamba.training.config import TrainConfig
from vlmamba.training.optim import build_optimizer
from vlmamba.training.parallel import make_parallel
from vlmamba.training.parts import trainable_parameters
from vlmamba.training.plan import Planner, PlanSettings
from vlmamba.training.precision import autocast
from vlmamba.training.run import prepare_model

ROOT = Path(__file__).resolve().parent.parent
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"parallel": "ddp"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2-full": {"parallel": "fsdp2", "sharding": {"shard": "full"}},
    "zero2": {"parallel": "zero2"},
    "zero3": {"parallel": "zero3"},
}
SIZES = {  # width, layers and vocabulary; rows and length of a batch; numbers in a bucket of DeepSpeed's
    "tiny": (128, 12, 1024, 2, 128, 200_000),
    "small": (256, 12, 4096, 2, 128, 500_000),
    "130m": (768, 24, 50280, 1, 128, 10_000_000),
}


class _Blocks(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


_mallinfo = ctypes.CDLL(None).mallinfo2  # of glibc 2.33 and newer
_mallinfo.restype = _Blocks


def allocated() -> int:
    """Bytes that malloc has handed out to all threads, tensors among them (`man mallinfo2`)."""
    found = _mallinfo()
    return int(found.uordblks + found.hblkhd)


class Peak(TorchDispatchMode):
    """The most that is allocated after any operation meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = allocated()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, allocated())
        return out


def measure(values: dict[str, Any], rows: int, length: int) -> dict[str, float]:
    """One process's part: bytes between steps, before an update, at the peak of a step, and of RSS."""
    without_compilation()
    config = TrainConfig.from_dict(values)
    before = resident("VmRSS")
    parallel = make_parallel(config.parallel, "cpu", config)
    model, _ = prepare_model(config, parallel.device)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()  # its own memory, not that of a file
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    inputs = batch_for(model, rows, length)

    def backward(called: Any, send: Callable[[torch.Tensor], None]) -> None:
        with autocast(config.precision, parallel.device):
            loss = called(**inputs, num_items=rows * length).loss
        send(loss)

    warm_up(model, lambda: backward(model, torch.Tensor.backward))
    start = allocated() - held
    wrapped = parallel.wrap(model)
    optimizer = parallel.build_optimizer(model, lambda m: build_optimizer(m, config.optim))

    def micro_step() -> None:
        with parallel.accumulate(wrapped, last=True):
            backward(wrapped, parallel.backward)

    def update() -> None:
        parallel.step(optimizer, trainable_parameters(wrapped).values(), 1.0, finite=True)

    for _ in range(2):  # states and buffers are made in the first steps
        micro_step()
        update()
    gc.collect()
    found = {"between": allocated() - start}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of RSS
    with Peak() as peak:
        micro_step()
        found["before update"] = allocated() - start
        update()
    return {**found, "peak": peak.bytes - start, "rss": resident("VmHWM") - before}


def batch_for(model: Any, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of an image and text, the later half of the text supervised."""
    tokens, size = model.multi_modal_projector.num_tokens, model.vision_tower.image_size
    ids = torch.full((rows, length), 5)
    ids[:, :tokens] = model.config.image_token_id
    labels = ids.masked_fill(torch.arange(length) < (length + tokens) // 2, -100)
    pixels = torch.zeros(rows, 3, size, size)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
    }


def warm_up(model: torch.nn.Module, backward: Callable[[], None]) -> None:
    """Let torch and kernels load their code and make their workspaces, which would be counted."""
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor

    weight = torch.nn.Parameter(torch.ones(2))
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()
    backward()
    model.zero_grad(set_to_none=True)
    gc.collect()


def resident(key: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def without_compilation() -> None:
    """Keep DeepSpeed on a CPU from compiling its shared-memory messages; gloo does."""
    if importlib.util.find_spec("deepspeed") is not None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def write_weights(folder: Path, size: str) -> dict[str, Any]:
    """Random weights of that size on disk; returns the values of a run on them."""
    from transformers import MambaConfig, SiglipVisionConfig, SiglipVisionModel

    from vlmamba.models.language import MambaLM
    from vlmamba.testing import tiny_tokenizer

    width, layers, vocabulary, *_ = SIZES[size]
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )  # fmt: skip
    SiglipVisionModel(vision).save_pretrained(folder / "vision")
    language = MambaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, pad_token_id=0, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    MambaLM(language).save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    return {
        "output": str(folder / "run"),
        "model": {
            "vision": {"family": "siglip", "path": str(folder / "vision"), "feature_layer": -2},
            "connector": {"name": "mlp"},
            "language": {"path": str(folder / "language")},
            "image": {"mode": "resize"},
            "chat": "mamba",
        },
        "train": ["multi_modal_projector", "language_model"],
        "data": {"sources": [{"annotations": "none.json"}]},
        "optim": {"lr": 1e-4},
        "device": "cpu",
        "loggers": [],
    }


def write_deepspeed(folder: Path, stage: int, bucket: int) -> str:
    """The settings of train/deepspeed/ with other buckets."""
    settings = json.loads((ROOT / f"train/deepspeed/zero{stage}.json").read_text())
    zero = settings["zero_optimization"]
    sizes = {key: bucket for key in zero if key.endswith("bucket_size")}
    if stage == 3:  # else a model of this size stays gathered whole
        sizes |= {"stage3_max_live_parameters": bucket, "stage3_max_reuse_distance": bucket}
        sizes["stage3_param_persistence_threshold"] = 1000
    zero.update(sizes)
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(settings))
    return str(path)


def planned(config: TrainConfig, nproc: int, rows: int, length: int) -> tuple[float, int]:
    """Bytes by `vlmamba plan`, and how many parameters train."""
    supervised = (length - (length + 16) // 2) / (length - 16)
    settings = PlanSettings(gpus=nproc, per_host=nproc, length=length, supervised=supervised)
    planner = Planner(config, settings)
    return planner.memory(planner.chosen()).total, planner.sizes.trained


def installed() -> list[str]:
    """Strategies that can be measured here."""
    return [s for s in STRATEGIES if not s.startswith("zero") or importlib.util.find_spec("deepspeed")]


def main() -> None:
    """Measure and print a table."""
    from vlmamba.testing.processes import run_ranks

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=installed())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="tiny is for the tests")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    unknown = sorted(set(given.strategies) - set(installed()))
    if unknown:
        parser.error(f"cannot measure {', '.join(unknown)}; here are: {', '.join(installed())}")
    rows, length, bucket = SIZES[given.size][3:]
    head = ("between", "of 16 n", "update", "peak", "plan", "plan/peak", "RSS")
    print(f"{'MB a process':<12} " + " ".join(f"{each:>9}" for each in head))
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = {**write_weights(folder, given.size), "precision": given.precision}
        common["batch"] = {"global_batch_size": rows * given.nproc, "micro_batch_size": rows}
        for strategy in given.strategies:
            values = {**common, **STRATEGIES[strategy]}
            if strategy.startswith("zero"):
                values["sharding"] = {"deepspeed": write_deepspeed(folder, int(strategy[-1]), bucket)}
            ends = run_ranks(
                Path(__file__), "measure", values, rows, length, world_size=given.nproc, folder=folder / strategy,
                environment={"OMP_NUM_THREADS": "1"}, seconds=600.0,
            )  # fmt: skip
            if any(end.exitcode for end in ends):
                sys.exit("\n".join(end.output for end in ends))
            fullest = {key: max(end.value[key] for end in ends) for key in ends[0].value}
            plan, trained = planned(TrainConfig.from_dict(values), given.nproc, rows, length)
            lines.append({"strategy": strategy, "trained": trained, "plan": plan, **fullest})
            print(_row(strategy, fullest, plan, trained), flush=True)
    print(
        f"n = {trained:,} parameters train; {given.nproc} processes, {given.precision}, fullest process of each"
    )
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1))


def _row(strategy: str, found: dict[str, float], plan: float, trained: int) -> str:
    mb = {key: value / 1e6 for key, value in found.items()}
    cells = [f"{mb['between']:.1f}", f"{found['between'] / (16 * trained):.2f}", f"{mb['before update']:.1f}"]
    cells += [f"{mb['peak']:.1f}", f"{plan / 1e6:.1f}", f"{plan / found['peak']:.2f}", f"{mb['rss']:.0f}"]
    return f"{strategy:<12} " + " ".join(f"{each:>9}" for each in cells)


if __name__ == "__main__":
    main()
