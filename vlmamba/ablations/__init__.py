"""Ablation tables: rows that differ in one thing, trained, measured and drawn by one command.

A table is a Python file in ``eval/ablations/`` whose function ``table(recipe)`` returns a `Table`.
"""

from vlmamba.ablations.table import OFFICIAL, Row, Table, load_table

__all__ = ["OFFICIAL", "Row", "Table", "load_table"]
