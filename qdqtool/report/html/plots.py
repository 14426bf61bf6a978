"""The plots of a page, as Bokeh's JSON. Colours are named by role in tags; the page's script fills them in.

A tag ``fill_color=--series-1`` sets that property to the CSS variable, anew whenever the colour scheme changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from qdqtool.report.histograms import TensorHistogram
from qdqtool.units import db

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource, Model, Range1d
    from bokeh.plotting import figure as Figure

ALONG: Final = "layer, in the order of the graph"
LAYER: Final = (("layer", "@name"), ("SQNR", "@y{%.1f} dB"))
POINT: Final = (("size", "@x{0,0.0} kB"), ("SQNR", "@y{%.1f} dB"))
_MARKERS: Final = ("circle", "square", "triangle", "diamond", "inverted_triangle", "star")
_FONT: Final = "system-ui, sans-serif"


def histogram(first: TensorHistogram, calibrators: Sequence[str]) -> dict[str, Any]:
    """Counts of a tensor over its values, linear and logarithmic, above the ranges of all calibrators.

    The script replaces the data by those of the tensor that is chosen, in the form of :func:`histogram_data`.
    """
    from bokeh.layouts import column
    from bokeh.models import ColumnDataSource, Range1d

    start = histogram_data(first, calibrators)
    lo, hi = _padded(first.lo, first.hi)
    values = Range1d(start=lo, end=hi, name="values")
    bars = ColumnDataSource(bar_columns(start), name="bars")
    plots = [_bars(scale, bars, values, start) for scale in ("linear", "log")]
    return item(column(*plots, _candidates(start["ranges"], values), sizing_mode="stretch_width"), "plot-histogram")


def _bars(scale: str, bars: ColumnDataSource, values: Range1d, start: Mapping[str, Any]) -> Figure:
    """Counts of values on a linear or logarithmic scale, the range in the model shaded."""
    from bokeh.models import NumeralTickFormatter, Range1d
    from bokeh.models.annotations import BoxAnnotation

    lowest, highest = _counts(start["counts"], scale)
    counts = Range1d(start=lowest, end=highest, name=f"counts_{scale}")
    shown = scale == "linear"
    plot = _figure(
        230, name=scale, x_range=values, y_range=counts, y_axis_type=scale, y_axis_label="values", visible=shown
    )
    if shown:
        plot.yaxis[0].update(formatter=NumeralTickFormatter(format="0,0"))
    quad = plot.quad(left="left", right="right", bottom=0 if shown else 0.5, top=f"top_{scale}", source=bars)
    quad.glyph.update(line_width=0.5, fill_alpha=0.85, tags=["fill_color=--series-1", "line_color=--series-1"])
    lo, hi = start["chosen"][:2]
    box = BoxAnnotation(left=lo, right=hi, fill_alpha=0.1, level="underlay", line_width=1, name=f"chosen_{scale}")
    box.update(tags=["fill_color=--series-3", "line_color=--series-3"])
    plot.add_layout(box)
    return _hovered(plot, [quad], [("from", "@left{%.4g}"), ("to", "@right{%.4g}"), ("values", "@count{0,0}")])


def _candidates(ranges: Mapping[str, Any], values: Range1d) -> Figure:
    """The range that each calibrator would choose."""
    from bokeh.models import ColumnDataSource, FactorRange

    names = FactorRange(factors=list(reversed(ranges["name"])))
    source = ColumnDataSource(ranges, name="ranges")
    plot = _figure(60 + 20 * len(ranges["name"]), x_range=values, y_range=names, x_axis_label="value")
    bar = plot.segment(x0="lo", x1="hi", y0="name", y1="name", source=source, line_width=3)
    bar.glyph.tags = ["line_color=--series-2"]
    for end in ("lo", "hi"):
        drawn = plot.scatter(x=end, y="name", source=source, size=8, marker="circle")
        drawn.glyph.tags = ["fill_color=--series-2", "line_color=--series-2"]
    plot.ygrid[0].visible = False
    tips = [("calibrator", "@name"), ("range", "@lo{%.4g} to @hi{%.4g}"), ("expected", "@sqnr")]
    return _hovered(plot, [bar], tips)


def histogram_data(one: TensorHistogram, calibrators: Sequence[str]) -> dict[str, Any]:
    """What the script wants of a tensor; numbers rounded to what can be seen."""
    candidates = {candidate.calibrator: candidate for candidate in one.candidates}
    shown = [candidates.get(name) for name in calibrators]
    return {
        "tensor": one.tensor,
        "lo": _short(one.lo),
        "hi": _short(one.hi),
        "counts": [round(count, 1) for count in one.counts],
        "chosen": [_short(one.chosen.lo), _short(one.chosen.hi), one.chosen.calibrator, db(one.chosen.sqnr_db)],
        "ranges": {
            "name": list(calibrators),
            "lo": [None if c is None else _short(c.lo) for c in shown],
            "hi": [None if c is None else _short(c.hi) for c in shown],
            "sqnr": ["" if c is None else db(c.sqnr_db) for c in shown],
        },
    }


def bar_columns(data: Mapping[str, Any]) -> dict[str, list[float]]:
    """The columns of the bars, as the script makes them too."""
    counts, lo, hi = data["counts"], data["lo"], data["hi"]
    if not hi > lo:
        lo, hi = lo - 0.5, hi + 0.5
    width = (hi - lo) / len(counts)
    return {
        "left": [lo + width * i for i in range(len(counts))],
        "right": [lo + width * (i + 1) for i in range(len(counts))],
        "count": counts,
        "top_linear": counts,
        "top_log": [max(count, 0.5) for count in counts],
    }


def depth(names: Sequence[str], local: Sequence[float | None], cumulative: Sequence[float | None]) -> dict[str, Any]:
    """SQNR in dB of layers in the graph's order: each quantized alone, and with all before it."""
    series = {"alone": _along(names, local), "with all before it": _along(names, cumulative)}
    return lines("depth", series, (ALONG, "SQNR, dB"), LAYER)


def _along(names: Sequence[str], values: Sequence[float | None]) -> dict[str, list[Any]]:
    """The layers whose value is known and finite, by their place in the graph."""
    known = [(i, value) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    return {"x": [i + 1 for i, _ in known], "y": [value for _, value in known], "name": [names[i] for i, _ in known]}


def sensitivity(names: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """SQNR in dB of the outputs with each layer in turn quantized, a line for each width."""
    known = {title: _along(names, values) for title, values in series.items()}
    return lines("sensitivity", {t: one for t, one in known.items() if one["x"]}, (ALONG, "SQNR, dB"), LAYER)


def lines(
    name: str,
    series: Mapping[str, Mapping[str, Sequence[Any]]],
    labels: tuple[str, str],
    tips: Sequence[tuple[str, str]],
    *,
    points: Collection[str] = (),
) -> dict[str, Any]:
    """Points joined by lines, a series each with the columns ``x``, ``y`` and those that ``tips`` name.

    Args:
        name: of the plot on the page.
        series: by what the legend calls them; those in ``points`` are not joined.
        labels: of both axes.
        tips: what is told about a point.
        points: see ``series``.
    """
    from bokeh.models import ColumnDataSource

    plot = _figure(300, name=name, x_axis_label=labels[0], y_axis_label=labels[1])
    drawn = []
    for index, (title, columns) in enumerate(series.items()):
        place = index % len(_MARKERS)
        colour, source = (
            f"--series-{1 + place}",
            ColumnDataSource({key: list(column) for key, column in columns.items()}),
        )
        if title not in points:
            line = plot.line("x", "y", source=source, line_width=2, legend_label=title)
            line.glyph.tags = [f"line_color={colour}"]
        dots = plot.scatter("x", "y", source=source, size=7, marker=_MARKERS[place], legend_label=title)
        dots.glyph.tags = [f"fill_color={colour}", f"line_color={colour}"]
        drawn.append(dots)
    _legend_above(plot)
    return item(_hovered(plot, drawn, tips), f"plot-{name}")


def item(model: Model, target: str) -> dict[str, Any]:
    """What the script embeds into the element ``target``."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item

    return dict(json_item(model, ID(target)))


def _figure(height: int, **options: Any) -> Figure:
    """A figure without frame, toolbar and background, as wide as its place."""
    from bokeh.plotting import figure

    plot = figure(
        height=height, sizing_mode="stretch_width", toolbar_location=None, tools="", min_border_left=52, **options
    )
    # Not transparent: what was drawn before the place had its size would stay.
    plot.update(outline_line_color=None, tags=["background_fill_color=--ground", "border_fill_color=--ground"])
    for axis in plot.axis:
        axis.update(axis_line_alpha=0.6, major_tick_line_alpha=0.6, minor_tick_line_color=None)
        axis.update(axis_label_text_font_style="normal", axis_label_text_font=_FONT, major_label_text_font=_FONT)
    return plot


def _legend_above(plot: Figure) -> None:
    """Put the legend where it hides no point; a click on an entry hides its series."""
    legend = plot.legend[0]
    legend.update(
        orientation="horizontal", click_policy="hide", padding=4, margin=0, background_fill_alpha=0, border_line_alpha=0
    )
    plot.add_layout(legend, "above")


def _hovered(plot: Figure, drawn: Sequence[Any], tips: Sequence[tuple[str, str]]) -> Figure:
    """The figure, telling ``tips`` about what the pointer is at; those with a % are formatted as by printf."""
    from bokeh.models import HoverTool

    formatted = re.findall(r"(@\w+)\{%", " ".join(tip for _, tip in tips))
    formatters: dict[str, Any] = dict.fromkeys(formatted, "printf")
    plot.add_tools(HoverTool(renderers=list(drawn), tooltips=list(tips), formatters=formatters))
    return plot


def _counts(counts: Sequence[float], scale: str) -> tuple[float, float]:
    """Ends of the axis of counts, as the script sets them too."""
    return (0, 1.05 * max(counts)) if scale == "linear" else (0.5, 2 * max(counts))


def _padded(lo: float, hi: float) -> tuple[float, float]:
    """Ends of an axis a little beyond the values."""
    pad = 0.04 * (hi - lo) or 0.5
    return lo - pad, hi + pad


def _short(value: float) -> float:
    return float(f"{value:.6g}")
