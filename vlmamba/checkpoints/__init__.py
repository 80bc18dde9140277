"""Checkpoints of other projects: files, two-way key maps, and the conversion of whole directories."""
