"""Pages: one skeleton and style, one chart function (`charts`), pictures inside; a page is one file that loads nothing.

Rooms that have something to show fill a template of ``templates/``; each extends ``page.html.jinja``, which has the
heading, the style and a content policy that forbids every load, and may use the macros of ``parts.jinja``.
"""

from __future__ import annotations

import base64
import functools
import io
from importlib import resources
from pathlib import Path
from typing import Any

from vlmamba.common.files import replace_text

LARGEST_SIDE = 320
"""Pixels; larger pictures are shrunk before they are embedded."""
LARGEST_PNG = 40_000
"""Bytes; larger pictures are embedded as JPEG."""


def render(template: str, *, title: str, **values: Any) -> str:
    """The page that ``templates/TEMPLATE.jinja`` makes of values.

    Halves of surrogates, as names of files may hold, are written as references.
    """
    page = str(_templates().get_template(f"{template}.jinja").render(title=title, **values))
    return page.encode("utf-8", "xmlcharrefreplace").decode("utf-8")


def write_page(path: str | Path, template: str, *, title: str, **values: Any) -> Path:
    """Render a page and replace its file as a whole."""
    replace_text(path, render(template, title=title, **values))
    return Path(path)


@functools.cache
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files(__name__) / "templates"
    environment.loader = jinja2.DictLoader(
        {entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.is_file()}
    )
    environment.filters["embedded"] = embedded
    return environment


def embedded(source: Any) -> str:
    """A picture (see `vlmamba.common.images.open_image`) as a ``data:`` address, shrunk to at most `LARGEST_SIDE`.

    Raises:
        ImageError: It cannot be read.
    """
    from vlmamba.common.images import open_image

    shown = open_image(source).copy()  # what was open belongs to the caller
    shown.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    kind, data = "png", _encoded(shown, "PNG")
    if len(data) > LARGEST_PNG:
        kind, data = "jpeg", _encoded(shown, "JPEG", quality=88)
    return data_address(data, f"image/{kind}")


def data_address(data: bytes, kind: str) -> str:
    """Bytes of a file as a ``data:`` address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, optimize=True, **options)
    return buffer.getvalue()
