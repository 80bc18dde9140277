"""Evaluation: tasks, scorers, answer files, the runner, results and reports.

    `task`      questions + prompt + scorer; files in ``eval/`` loaded by name or path
    `scorers`   pure functions over plain Python values
    `records`   answers on disk, appended, synced, resumable
    `scoring`   from answers to a result
    `shuffle`   the blind baseline's pictures
    `runner`    batched greedy generation (imports torch)
    `cli`       what ``vlmamba eval`` calls: a checkpoint over tasks, scoring of answer files
    `report`    one self-contained HTML page (`curves` draws its charts); `tables` the same for a terminal

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from vlmamba.evaluation.scorers import Score
from vlmamba.evaluation.task import Sample, Task, image_first, load_task, task_names

__all__ = ["Sample", "Score", "Task", "image_first", "load_task", "task_names"]
