"""Recipes: what to train, one a file. They are loaded by path (``train/vl_mamba.py:finetune``), never imported."""
