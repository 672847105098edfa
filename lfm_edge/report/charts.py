"""Charts as inline SVG: pure functions of figures, without a script.

Colours come from the page's style sheet by class (`s0` to `s7` of a series, `p0` ... of a part), so that they suit
light and dark; series differ by the shape of their marks as well, for those who do not tell the colours apart. Text is
escaped. Figures that are not finite, or absurdly large, are not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

SERIES_COLOURS = 8
WIDTH, HALF, _HEIGHT = 880, 450, 340  # HALF: of charts that stand in pairs
_RIGHT, _TOP, _BOTTOM = 24, 16, 44
_ROW, _BAR, _LINE, _NARROWEST = 26, 14, 16, 80
_CHARACTER = 6.7  # of a 12 px sans serif, on average
_LONGEST_LABEL = 38
_TICKS = 5
_LARGEST, _SMALLEST = 1e30, 1e-30

# Marks of a radius of about 4.5, around the origin.
_CROSS = "M-5-3.4L-3.4-5L0-1.6L3.4-5L5-3.4L1.6 0L5 3.4L3.4 5L0 1.6L-3.4 5L-5 3.4L-1.6 0Z"
_MARKS = ("M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z", "M-4-4H4V4H-4Z", "M0-5.4L5.2 3.9H-5.2Z",
          "M0-5.8L5.8 0L0 5.8L-5.8 0Z", "M0 5.4L5.2-3.9H-5.2Z", "M-2.6-5H2.6L5.2 0L2.6 5H-2.6L-5.2 0Z",
          "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z")  # circle, square, triangles, rhombus, hexagon, plus


@dataclass(frozen=True)
class Value:
    """A figure with the range it was seen in. low, high: the figure itself where there is no range"""

    value: float
    low: float
    high: float

    @classmethod
    def alone(cls, value: float) -> Value:
        """Without a range."""
        return cls(value, value, value)

    @property
    def finite(self) -> bool:
        """Whether it can be drawn."""
        return all(map(_drawable, (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Series:
    """A line, or a group of marks. index: of its colour and mark; points: (x, figure)"""

    name: str
    index: int
    points: Sequence[tuple[float, Value]]


@dataclass(frozen=True)
class Bar:
    """A row of horizontal bars, or a mark with its range.

    parts: lengths that stand end to end; index: of the colour where there is one part; note: text beside it
    mark: where a tick stands, such as what was measured; whisker: a range around the end
    """

    label: str
    parts: Sequence[float]
    note: str = ""
    index: int = 0
    mark: float | None = None
    whisker: Value | None = None
    faint: bool = False


@dataclass(frozen=True)
class Line:
    """A vertical line through all rows, such as a budget."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A row with a mark on a logarithmic axis, what it must not pass, and its noise.

    index: of colour and mark; bad: drawn as a failure
    """

    label: str
    at: Value
    note: str = ""
    index: int = 0
    limit: float | None = None
    floor: float | None = None
    bad: bool = False


@dataclass(frozen=True)
class Axis:
    """From figures to pixels. ticks: (figure, its text)"""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    ticks: Sequence[tuple[float, str]] = field(default_factory=tuple)

    def at(self, value: float) -> float:
        """The pixel of a figure; of one outside, the nearest end."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def lines(series: Sequence[Series], *, title: str, x_title: str, y_title: str, logarithmic: bool = False) -> Markup:
    """Lines over x with ranges, from zero up. logarithmic: powers of two along x

    Nothing where no figure can be drawn.
    """
    series = [Series(one.name, one.index, sorted(
        ((x, y) for x, y in one.points if y.finite and _drawable(x) and (x >= 1 or not logarithmic)),
        key=lambda point: point[0])) for one in series]
    xs = sorted({x for one in series for x, _ in one.points})
    if not xs:
        return Markup("")
    highest = max(y.high for one in series for _, y in one.points)
    y_axis = _linear(0, highest, _HEIGHT - _BOTTOM, _TOP)
    left = 16 + max(_width(text) for _, text in y_axis.ticks) + 18
    x_axis = _powers(xs[0], xs[-1], left + 14, WIDTH - _RIGHT - 14, xs) if logarithmic else _linear(
        xs[0] if len(xs) > 1 else 0, xs[-1], left + 14, WIDTH - _RIGHT - 14)
    drawn = [_grid(y_axis, left, WIDTH - _RIGHT)]
    drawn += [_text(x_axis.at(x), _HEIGHT - _BOTTOM + 18, text, "middle") for x, text in x_axis.ticks]
    drawn.append(_text((left + WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_title, "middle", "axis"))
    drawn.append(Markup('<text class="axis" transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>')
                 .format(_n((_TOP + _HEIGHT - _BOTTOM) / 2), y_title))
    for order, one in enumerate(series):
        aside = (order - (len(series) - 1) / 2) * min(7, 42 / len(series))  # ranges at one x stand side by side
        places = [(x_axis.at(x) + aside, y, x) for x, y in one.points]
        path = " ".join(f"{'L' if count else 'M'}{_n(x)} {_n(y_axis.at(y.value))}" for count, (x, y, _) in
                        enumerate(places))
        drawn.append(Markup('<g class="{}"><path class="line" d="{}"/>').format(colour(one.index), path))
        for x, y, figure in places:
            drawn += [_range(x, y_axis.at(y.low), y_axis.at(y.high)),
                      _mark(shape(one.index), x, y_axis.at(y.value), f"{one.name}: {_figure(y.value)} "
                            f"({_figure(y.low)} to {_figure(y.high)}) at {_figure(figure)}")]
        drawn.append(Markup("</g>"))
    return _svg(drawn, _HEIGHT, title) + legend([(one.name, one.index) for one in series])


def bars(rows: Sequence[Bar], *, title: str, unit: float = 1.0, x_title: str, part_names: Sequence[str] = (),
         limits: Sequence[Line] = (), mark_name: str = "", at_least: float = 0.0, width: int = WIDTH,
         heading: str = "") -> Markup:
    """Horizontal bars from zero, stacked where they have several parts.

    unit: by which figures are divided for the axis; part_names: of stacked parts, in order
    limits: drawn where they are less than three times the longest bar, and said to be beyond the edge otherwise
    at_least: what the axis reaches at least; heading: above the chart, which then has no legend of its own
    """
    rows = [row for row in rows if all(map(_drawable, row.parts))]
    if not rows:
        return Markup("")
    longest = max([at_least, *(max(sum(_positive(row.parts)), row.mark or 0, row.whisker.high if row.whisker else 0)
                               for row in rows)])
    limits = [line for line in limits if _drawable(line.at)]
    shown = [line for line in limits if line.at <= 3 * longest]
    beyond = [line for line in limits if line.at > 3 * longest]
    left = _label_width(row.label for row in rows)
    top = _TOP + _LINE * (len(beyond) or bool(shown)) + _LINE * bool(heading)
    noted = max((_width(row.note) for row in rows), default=0)
    bottom = top + _ROW * len(rows)
    right = max(width - _RIGHT - (noted + 8 if noted else 0), left + _NARROWEST)
    axis = _linear(0, max([longest, *(line.at for line in shown)]) / unit, left, right)
    drawn = [_heading(heading), _columns(axis, top, bottom)]
    for place, row in enumerate(rows):
        drawn += _bar(row, top + _ROW * (place + 0.5), axis, unit, part_names, mark_name)
    for line in shown:
        x = axis.at(line.at / unit)
        drawn.append(Markup('<path class="limit" d="M{0} {1}V{2}"/>').format(_n(x), _n(top - 6), _n(bottom)))
        drawn.append(_text(min(x, width - _RIGHT - _width(line.label) / 2), top - 10, line.label, "middle",
                           "limit-text"))
    for place, line in enumerate(beyond):
        drawn.append(_text(width - _RIGHT, top - 10 - _LINE * place, f"{line.label}, beyond this edge \u2192", "end",
                           "limit-text"))
    drawn.append(_text((left + right) / 2, bottom + 36, x_title, "middle", "axis"))
    names = [] if heading else [(name, place) for place, name in enumerate(part_names)]
    return _svg(drawn, bottom + _BOTTOM, title, width) + legend(names, parts=True, mark="" if heading else mark_name)


def pairs(groups: Sequence[tuple[str, Sequence[Dot]]], *, title: str, x_title: str, one: bool = False) -> list[Markup]:
    """Charts to stand side by side, each under its heading: marks with ranges on one logarithmic axis, a row each.

    one: a line at 1, which is no difference
    """
    seen = [x for _, rows in groups for row in rows
            for x in (row.at.low, row.at.value, row.at.high, row.limit, row.floor)
            if x is not None and _drawable(x) and x > _SMALLEST] or [1.0]
    return [_dots(rows, heading, f"{heading}: {title}", x_title, one, (min(seen), max(seen)))
            for heading, rows in groups]


def _dots(rows: Sequence[Dot], heading: str, title: str, x_title: str, one: bool, reach: tuple[float, float]) -> Markup:
    """One of `pairs`. reach: of the axis, at least"""
    rows = [row for row in rows if row.at.finite]
    if not rows:
        return Markup("")
    left, noted = _label_width(row.label for row in rows), max(_width(row.note) for row in rows)
    top = _TOP + _LINE
    right, bottom = max(HALF - _RIGHT - noted - 8, left + _NARROWEST), top + _ROW * len(rows)
    axis = (_ratios if one else _decades)(*reach, left, right)
    drawn = [_heading(heading), _columns(axis, top, bottom)]
    if one:
        drawn.append(Markup('<path class="one" d="M{0} {1}V{2}"/>').format(_n(axis.at(1)), top, bottom))
    for place, row in enumerate(rows):
        drawn += _dot(row, top + _ROW * (place + 0.5), axis)
    drawn.append(_text((left + right) / 2, bottom + 36, x_title, "middle", "axis"))
    return _svg(drawn, bottom + _BOTTOM, title, HALF)


def legend(entries: Iterable[tuple[str, int]], *, parts: bool = False, mark: str = "") -> Markup:
    """What the colours are. entries: (name, index); nothing for none"""
    made = [(key("part", "M-6-6H6V6H-6Z", f"p{index}") if parts else key("mark", shape(index), colour(index)), name)
            for name, index in entries]
    made += [(key("tick", "M0-7V7"), mark)] if mark else []
    items = Markup("").join(Markup("<li>{}{}</li>").format(*entry) for entry in made)
    return Markup('<ul class="legend">{}</ul>').format(items) if items else items


def key(kind: str, path: str, group: str = "") -> Markup:
    """The small picture of a legend's entry."""
    return Markup('<svg class="key {}" viewBox="-7 -7 14 14" aria-hidden="true">'
                  '<path class="{}" d="{}"/></svg>').format(group, kind, path)


def meter(share: float, *, over: bool = False) -> Markup:
    """A small bar for a table's cell. share: of the whole, 0 to 1, what is more is full"""
    share = min(max(share, 0.0), 1.0) if _drawable(share) else 0.0
    return Markup('<svg class="meter{}" viewBox="0 0 60 6" aria-hidden="true"><rect class="rail" width="60" height="6" '
                  'rx="3"/><rect class="level" width="{}" height="6" rx="3"/></svg>').format(
                      " over" if over else "", _n(60 * share))


def colour(index: int) -> str:
    """The class of a series' colour."""
    return f"s{index % SERIES_COLOURS}"


def shape(index: int) -> str:
    """The path of a series' mark. When the colours come round again, the marks are shifted against them."""
    return _MARKS[(index + index // SERIES_COLOURS) % len(_MARKS)]


def _bar(row: Bar, y: float, axis: Axis, unit: float, part_names: Sequence[str], mark_name: str) -> list[Markup]:
    """A row of `bars`."""
    drawn, start = [_label(row.label, axis.start - 10, y)], 0.0
    for place, part in enumerate(row.parts):
        end = start + max(part, 0.0)
        name = f"{part_names[place]}: " if part_names else ""
        drawn.append(Markup('<g class="{}"><rect class="part{}" x="{}" y="{}" width="{}" height="{}"><title>{}</title>'
                            "</rect></g>").format(
            f"p{place}" if part_names else colour(row.index), " faint" if row.faint else "", _n(axis.at(start / unit)),
            _n(y - _BAR / 2), _n(axis.at(end / unit) - axis.at(start / unit)), _BAR,
            f"{row.label}: {name}{_figure(part / unit)}"))
        start = end
    if row.whisker and row.whisker.finite and row.whisker.high > row.whisker.low:
        drawn.append(_whisker(axis.at(row.whisker.low / unit), axis.at(row.whisker.high / unit), y))
    reach = max(start, row.whisker.high if row.whisker and row.whisker.finite else 0)
    if row.mark is not None and _drawable(row.mark):
        drawn.append(Markup('<path class="tick" d="M{} {}v{}"><title>{}</title></path>').format(
            _n(axis.at(row.mark / unit)), _n(y - _BAR / 2 - 4), _BAR + 8,
            f"{row.label}: {mark_name} {_figure(row.mark / unit)}"))
        reach = max(reach, row.mark)
    if row.note:
        drawn.append(_text(axis.at(reach / unit) + 8, y + 4, row.note, "start", "note"))
    return drawn


def _dot(row: Dot, y: float, axis: Axis) -> list[Markup]:
    """A row of `dots`."""
    drawn = [_label(row.label, axis.start - 10, y)]
    if row.floor is not None and row.floor > 0 and _drawable(row.floor):
        drawn.append(Markup('<path class="floor" d="M{} {}v12"><title>noise floor {}</title></path>').format(
            _n(axis.at(row.floor)), _n(y - 6), _figure(row.floor)))
    if row.limit is not None and row.limit > 0 and _drawable(row.limit):
        drawn.append(Markup('<path class="limit solid" d="M{} {}v{}"><title>limit {}</title></path>').format(
            _n(axis.at(row.limit)), _n(y - _ROW / 2), _ROW, _figure(row.limit)))
    if row.at.high > row.at.low:
        drawn.append(Markup('<g class="{}">{}</g>').format(
            colour(row.index), _whisker(axis.at(row.at.low), axis.at(row.at.high), y)))
    drawn.append(Markup('<g class="{}">{}</g>').format(
        "bad" if row.bad else colour(row.index),
        _mark(_CROSS if row.bad else shape(row.index), axis.at(row.at.value), y,
              f"{row.label}: {_figure(row.at.value)}")))
    if row.note:
        drawn.append(_text(axis.end + 12, y + 4, row.note, "start", "note"))
    return drawn


def _linear(low: float, high: float, start: float, end: float) -> Axis:
    """Round steps; from `low`, which is kept, to a round end."""
    high = high if high - low > _SMALLEST else low + 1.0
    step = _round_step((high - low) / _TICKS)
    last = math.ceil(high / step - 1e-9)
    ticks = [(count * step, _figure(count * step)) for count in range(math.ceil(low / step - 1e-9), last + 1)]
    return Axis(low, max(last * step, high), start, end, ticks=ticks)


def _round_step(rough: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def _powers(low: float, high: float, start: float, end: float, figures: Sequence[float]) -> Axis:
    """Logarithmic, with ticks at the figures themselves as far as they are apart."""
    if low == high:
        low, high = low / 2, high * 2
    axis, ticks, free = Axis(low, high, start, end, True), [], -math.inf
    for figure in figures:
        half = _width(_figure(figure)) / 2
        if axis.at(figure) - half > free:
            ticks.append((figure, _figure(figure)))
            free = axis.at(figure) + half + 8
    return Axis(low, high, start, end, True, ticks)


def _decades(low: float, high: float, start: float, end: float) -> Axis:
    """Logarithmic, from a power of ten to another."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    step = math.ceil((last - first) / 8)
    ticks = [(10.0 ** power, f"{10.0 ** power:,g}" if -2 <= power <= 4 else f"1e{power}")
             for power in range(first, last + 1, step) if 10.0 ** power > 0]
    return Axis(ticks[0][0], 10.0 ** min(last, 308), start, end, True, ticks)


def _ratios(low: float, high: float, start: float, end: float) -> Axis:
    """Logarithmic around 1."""
    reach = max(high, 1 / low, 1.05)
    for steps in ((0.95, 1, 1.05), (0.9, 1, 1.1), (0.8, 0.9, 1, 1.1, 1.25), (0.5, 0.67, 1, 1.5, 2),
                  (0.25, 0.5, 1, 2, 4), (0.125, 0.25, 0.5, 1, 2, 4, 8)):
        if reach <= steps[-1]:
            return Axis(steps[0], steps[-1], start, end, True, [(step, f"{step:g}") for step in steps])
    return _decades(1 / reach, reach, start, end)


def _svg(drawn: Iterable[Markup], height: float, title: str, width: int = WIDTH) -> Markup:
    return Markup('<div class="chart"><svg viewBox="0 0 {} {}" role="img" aria-label="{}" '
                  'style="min-width:{}px;max-width:{}px">{}</svg></div>').format(
                      width, _n(height), title, round(width * 0.7), width, Markup("").join(drawn))


def _grid(axis: Axis, left: float, right: float) -> Markup:
    """Horizontal lines with their figures."""
    return Markup("").join(
        Markup('<path class="grid" d="M{} {}H{}"/>').format(_n(left), _n(axis.at(value)), _n(right))
        + _text(left - 8, axis.at(value) + 4, text, "end") for value, text in axis.ticks)


def _columns(axis: Axis, top: float, bottom: float) -> Markup:
    """Vertical lines with their figures below."""
    return Markup("").join(
        Markup('<path class="grid" d="M{} {}V{}"/>').format(_n(axis.at(value)), _n(top), _n(bottom))
        + _text(axis.at(value), bottom + 16, text, "middle") for value, text in axis.ticks)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(_n(x), _n(y), anchor, kind, text)


def _heading(text: str) -> Markup:
    return Markup('<text x="0" y="13" class="heading">{}</text>').format(text) if text else Markup("")


def _label(text: str, x: float, y: float) -> Markup:
    """A row's name, which ends at x; the middle of a long one is left out."""
    half = _LONGEST_LABEL // 2
    short = text if len(text) <= _LONGEST_LABEL else f"{text[:half - 1]}\u2026{text[-half:]}"
    return Markup('<text x="{}" y="{}" text-anchor="end" class="label">{}<title>{}</title></text>').format(
        _n(x), _n(y + 4), short, text)


def _mark(path: str, x: float, y: float, title: str) -> Markup:
    return Markup('<path class="mark" transform="translate({} {})" d="{}"><title>{}</title></path>').format(
        _n(x), _n(y), path, title)


def _range(x: float, low: float, high: float) -> Markup:
    """An upright whisker."""
    return Markup('<path class="whisker" d="M{0} {1}V{2}M{3} {1}h6M{3} {2}h6"/>').format(
        _n(x), _n(low), _n(high), _n(x - 3)) if low != high else Markup("")


def _whisker(low: float, high: float, y: float) -> Markup:
    """A lying one."""
    return Markup('<path class="whisker" d="M{0} {2}H{1}M{0} {3}v6M{1} {3}v6"/>').format(
        _n(low), _n(high), _n(y), _n(y - 3))


def _label_width(labels: Iterable[str]) -> float:
    return 18 + max(min(_width(label), _CHARACTER * _LONGEST_LABEL) for label in labels)


def _width(text: str) -> float:
    """Pixels of a text, about."""
    return _CHARACTER * len(text)


def _positive(values: Iterable[float]) -> list[float]:
    return [max(value, 0.0) for value in values]


def _figure(value: float) -> str:
    """A figure for an axis or a tip: few digits, thousands apart."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _drawable(value: float) -> bool:
    return abs(value) < _LARGEST  # NaN is not


def _n(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")
