"""The one chart: what is drawn lies where its values are, whatever they are."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from vlmamba.pages import charts
from vlmamba.pages.charts import (
    Series,
    chart,
    envelope,
    log_ticks,
    loss_series,
    nice_ticks,
    smoothed,
    thinned,
)


def drawn(*series, **options):
    """The chart's elements: (tag, class, attributes)."""
    svg = chart(series, **{"label": "a chart", **options})
    return [(e.tag, e.get("class"), e.attrib, e.text) for e in ET.fromstring(svg).iter()]


def test_a_run():
    points = [(float(i), 4 * 0.998**i + 0.01) for i in range(1, 2001)]
    svg = chart(loss_series(points), label='a "b"')
    assert svg.count("<polyline") == 2
    assert "a &quot;b&quot;" in svg
    assert len(svg) < 20_000
    assert "<svg" in chart(loss_series([(3.0, 0.0)]), label="one")


def test_ticks_and_lines():
    assert nice_ticks(0, 3.3, 5) == [0, 1, 2, 3, 4]
    assert nice_ticks(1, 190, 5)[-1] >= 190
    assert nice_ticks(0, 0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert nice_ticks(98, 98, 5)[-1] < 120
    assert log_ticks(0.07, 3.0) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2, 5])
    points = [(float(i), float(i == 777)) for i in range(2000)]
    assert max(y for _, y in envelope(points)) == 1.0
    assert thinned(points)[-1] == points[-1]
    assert smoothed([(0.0, 2.0), (1.0, 2.0)]) == [(0.0, 2.0), (1.0, 2.0)]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_dots_and_spans_lie_in_proportion(scale):
    dots = [(0.0, 0.0), (scale, 3 * scale), (2 * scale, scale)]
    elements = drawn(Series(dots, "dots"), Series([dots[0], dots[2]], "spans", colour=1))
    at = [(float(e["cx"]), float(e["cy"])) for tag, kind, e, _ in elements if kind == "dot"]
    assert (at[1][0] - at[0][0]) * 2 == pytest.approx(at[2][0] - at[0][0], abs=0.3)
    assert (at[0][1] - at[2][1]) * 3 == pytest.approx(at[0][1] - at[1][1], abs=0.5)
    (span,) = [e for _, kind, e, _ in elements if kind == "span"]
    assert [float(span[k]) for k in ("x1", "y1", "x2", "y2")] == pytest.approx([*at[0], *at[2]], abs=0.06)


def test_rows_go_down_in_their_order():
    elements = drawn(Series([(5.0, 0.0), (7.0, 1.0)], "dots"), rows=["first <&>", "second"])
    down = [float(e["cy"]) for _, kind, e, _ in elements if kind == "dot"]
    names = {text: float(e["y"]) for tag, _, e, text in elements if tag == "text"}
    assert down[0] < down[1]
    assert names["first <&>"] - down[0] == pytest.approx(names["second"] - down[1], abs=0.2)


def test_bars_stand_on_the_axis_and_are_as_high_as_their_values():
    elements = drawn(Series([(8.0, 10.0), (16.0, 5.0)], "bars", notes=["ten", "five"]))
    heights = [float(e["height"]) for tag, _, e, _ in elements if tag == "rect"]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert [text for tag, _, _, text in elements if tag == "title"] == ["ten", "five"]


def test_small_losses_are_on_a_logarithmic_axis():
    points = [(0.0, 10.0), (1.0, 1.0), (2.0, 0.1)]
    elements = drawn(Series(points), Series(points[-1:], "dots"))
    (line,) = [e["points"] for tag, _, e, _ in elements if tag == "polyline"]
    down = [float(point.split(",")[1]) for point in line.split()]
    assert down[1] - down[0] == pytest.approx(down[2] - down[1], abs=0.2)


def test_names_are_in_a_legend_and_a_file_has_its_own_style(tmp_path):
    svg = chart([Series([(0.0, 1.0), (1.0, 2.0)], name="<row>", colour=3)], label="x")
    assert "&lt;row&gt;" in svg
    assert svg.count(charts.PALETTE[3]) == 2
    text = charts.write_chart(tmp_path / "a/b.svg", svg).read_text()
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert re.search(r"<style>.*\.tick", text)
