"""Loading pictures: the loader of training beside a bare Pillow loop, in images a second of one core.

    python benchmarks/loader.py                  # 200 pictures of 640 x 480, to 384 x 384
    python benchmarks/loader.py --rounds 9 --workers 2

The bare loop opens, converts to RGB, resizes (bicubic) and makes the normalised float tensor that an encoder takes; the
loader does the same for LLaVA rows, and also reads the row, tokenises it, makes labels and collates; its pictures are
also timed alone. They take turns
in one process; reported is the median ratio. With --workers the loader is also timed with processes of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vlmamba.data import Loader, PlanSettings, VLDataset, build_loader, build_source
from vlmamba.errors import require
from vlmamba.models import VLMambaImageProcessor, VLMambaProcessor
from vlmamba.models.chat import load_template

SIZE = 384
MEAN = STD = 0.5


PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg")
WORDS = (
    "the a of and with in on is are there two one red white small large wooden man woman dog table street window "
    "standing sitting holding next to behind while looking appears scene photograph background several people "
    "which suggests that creating atmosphere additionally visible near bright together"
)


def write_task(folder: Path, count: int) -> list[Path]:
    """JPEG files of 640 x 480 cut from scikit-image's photographs, and a conversation of three turns each.

    An answer has 30 to 60 words: about 900 characters a row and 200 tokens of text, as in LLaVA-Instruct-150K.
    """
    data = Path(str(require("skimage", extra="dev", feature="benchmarks/loader.py").__file__)).parent / "data"
    generator = np.random.default_rng(0)
    photos = [Image.open(data / name).convert("RGB") for name in PHOTOS]
    paths, rows = [], []
    for number in range(count):
        photo = photos[number % len(photos)]
        scale = float(generator.uniform(0.6, 1.0))
        width = int(min(photo.width, photo.height * 4 / 3) * scale)
        left = int(generator.integers(photo.width - width + 1))
        top = int(generator.integers(photo.height - width * 3 // 4 + 1))
        box = (left, top, left + width, top + width * 3 // 4)
        path = folder / f"{number:05}.jpg"
        photo.resize((640, 480), Image.Resampling.LANCZOS, box=box).save(path, quality=95)
        paths.append(path)
        turns = []
        for turn in range(3):
            question, answer = (_words(generator, low, high) for low, high in ((6, 12), (30, 60)))
            turns.append({"from": "human", "value": ("" if turn else "<image>\n") + question + "?"})
            turns.append({"from": "gpt", "value": answer + "."})
        rows.append({"id": f"{number:012}", "image": path.name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return paths


def _words(generator: np.random.Generator, low: int, high: int) -> str:
    return " ".join(generator.choice(WORDS.split(), int(generator.integers(low, high))).tolist()).capitalize()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows these words, as a vocabulary of 50,000 knows English ones: a token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = " ".join([WORDS, *(word.capitalize() for word in WORDS.split())])
    tokenizer.train_from_iterator([text, load_template("vicuna_v1")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def bare(paths: list[Path]) -> None:
    """Open, convert, resize, to a normalised tensor."""
    for path in paths:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy()).float().div_(255)
        pixels.sub_(MEAN).div_(STD)


def make_loader(folder: Path, workers: int) -> Loader:
    """The loader of training over the rows, 16 in a micro-batch."""
    processor = VLMambaProcessor(
        VLMambaImageProcessor(size=SIZE, mode="resize", mean=[MEAN] * 3, std=[STD] * 3, resample="bicubic"),
        make_tokenizer(),
        chat_template=load_template("vicuna_v1"),
        num_image_tokens=729,
    )
    source = build_source("llava", annotations=folder / "rows.json", image_root=folder)
    dataset = VLDataset(source, processor)
    return build_loader(dataset, PlanSettings(step_samples=16, micro_samples=16), num_workers=workers)


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of a call."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


def pictures(loader: Loader) -> None:
    """What the loader does with pictures, without text and collation."""
    for row in range(loader.num_rows):
        sample = loader.dataset.sample(row)
        loader.dataset.load_images(sample, sample.images, [])


def drain(loader: Loader) -> None:
    """One epoch."""
    for _ in loader:
        pass


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # both as in the loader's own processes, see vlmamba.data.loader.set_up_worker
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_task(folder, arguments.images)
        loader = make_loader(folder, 0)
        contenders: dict[str, Callable[[], object]] = {
            "bare Pillow loop": lambda: bare(paths),
            "loader, pictures alone": lambda: pictures(loader),
            "loader": lambda: drain(loader),
        }
        if arguments.workers:
            many = make_loader(folder, arguments.workers)
            contenders[f"loader, {arguments.workers} workers"] = lambda: drain(many)
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in contenders}
        for call in contenders.values():
            call()  # caches of the disk, workers
        for _ in range(arguments.rounds):
            for key, call in contenders.items():
                times[key].append(seconds(call))
    gc.unfreeze()
    reference = times["bare Pillow loop"]
    print("medians of turns: images a second, share of the bare loop's; the same by processor time")
    for key, values in times.items():
        cells = []
        for kind in (0, 1):
            if kind and "worker" in key:
                continue  # its time is spent in another process
            ratio = statistics.median(a[kind] / b[kind] for a, b in zip(reference, values, strict=True))
            rate = arguments.images / statistics.median(value[kind] for value in values)
            cells.append(f"{rate:8.1f} {ratio:7.1%}")
        print(f"{key:24} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
