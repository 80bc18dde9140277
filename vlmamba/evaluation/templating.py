"""Pages from templates: everything inside one file, written as a whole."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any


def template(name: str) -> Any:
    """A template of ``vlmamba/evaluation/templates``; it may include the others."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("vlmamba.evaluation") / "templates"
    texts = {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".jinja")
    }
    environment.loader = jinja2.DictLoader(texts)
    return environment.get_template(name)


def write_page(path: str | Path, html: str) -> Path:
    """Replace a page as a whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
