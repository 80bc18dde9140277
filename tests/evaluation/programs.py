"""What the processes of a test do; loaded by path in each of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from vlmamba.cli import main
from vlmamba.common.processes import Group, read_launch
from vlmamba.evaluation import runner
from vlmamba.evaluation.task import load_task
from vlmamba.testing import tiny_model


def command(words: list[str]) -> int:
    """``vlmamba ...``."""
    return main(words)


def measure(task_file: str, annotations: str, output: str, batch_size: int, pause: float) -> dict[str, Any]:
    """Ask slowly enough to be killed, and log every question before it is asked."""
    model, processor = tiny_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator))
    launch = read_launch()
    ranks = Group(launch if launch.world_size > 1 else None)
    generate = runner.generate_answers
    asked = Path(output).with_suffix(".asked")

    def logged(model: Any, processor: Any, questions: Any, **options: Any) -> Any:
        with asked.open("a") as file:
            file.writelines(f"{question.sample.question_id}\n" for question in questions)
        time.sleep(pause)
        return generate(model, processor, questions, **options)

    runner.generate_answers = logged
    task = load_task(task_file, annotations=annotations)
    result = runner.evaluate(
        model, processor, task, output, batch_size=batch_size, progress=False, ranks=ranks
    )
    ranks.close()
    return result
