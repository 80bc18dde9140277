"""Benchmarks, one file each: ``task(annotations=..., images=...) -> Task``, loaded by path."""
