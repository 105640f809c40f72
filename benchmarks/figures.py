"""Pictures with Pillow: image grids, heat-map overlays, boxes, charts with axes and a legend.

    image_grid("grid.png", images, titles=names, columns=8)
    line_chart("curve.png", {"SGD": (steps, loss), "AdamP": (steps, loss2, error)}, logy=True)
    bar_chart("bars.png", ["top-1", "ECE"], {"CAM": [70, 5], "CALM": [69, 3]})
    chart = Chart((0, 1), (0, 1), title="anything")
    chart.line(x, y)
    chart.save("own.png")

Images are (H, W), (H, W, 3) or (3, H, W), uint8 or float in [0, 1], arrays or tensors.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from records import write_atomically

COLORS = ("#1f6fb4", "#d9541e", "#2f9e44", "#8e44ad", "#d9a400", "#25b8cc", "#6b1f2b", "#6e6e6e",
          "#ec7fc4", "#9cbf1a")
INK, GRID = "#333333", "#e4e4e4"
ZOOM = 2                                      # charts are drawn larger and reduced: smooth lines


# ---------------------------------------------------------------- images

def as_image(image) -> np.ndarray:
    """(H, W, 3) uint8 from any of the accepted forms."""
    array = _array(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise ValueError(f"image must be (H, W), (H, W, 3) or (3, H, W), not {array.shape}")
    if array.dtype.kind in "iu" and not 0 <= array.min() <= array.max() <= 255:
        raise ValueError(f"integer images must be in 0..255, not {array.min()}..{array.max()}")
    if array.dtype == bool or array.dtype.kind == "f":
        array = (np.clip(np.nan_to_num(array.astype(np.float64)), 0, 1) * 255).round()
    return np.ascontiguousarray(np.broadcast_to(array.astype(np.uint8), (*array.shape[:2], 3)))


def _array(values) -> np.ndarray:
    """A NumPy array; bfloat16, which NumPy does not know, becomes float32."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def heat_colors(heat) -> np.ndarray:
    """(H, W) values from their minimum (dark blue) to their maximum (yellow): (H, W, 3) uint8.

    NaN is dark blue; infinities are drawn as the largest or smallest finite value."""
    heat = _array(heat).astype(np.float64)
    if heat.ndim != 2 or not heat.size:
        raise ValueError(f"heat must be (H, W), not {heat.shape}")
    low, high = _extent(heat) or (0.0, 1.0)
    level = np.nan_to_num((heat.clip(low, high) - low) / (high - low if high > low else 1))
    stops = ((48, 18, 90), (40, 90, 140), (33, 145, 140), (110, 205, 88), (253, 231, 37))
    at = np.linspace(0, 1, len(stops))
    colors = np.stack([np.interp(level, at, channel) for channel in zip(*stops)], -1)
    return colors.round().astype(np.uint8)


def overlay(image, heat, strength: float = 0.5) -> np.ndarray:
    """The heat map (any size, enlarged bilinearly) mixed over the image; (H, W, 3) uint8."""
    image = as_image(image)
    colors = Image.fromarray(heat_colors(heat)).resize(image.shape[1::-1], Image.BILINEAR)
    return (image * (1 - strength) + np.asarray(colors) * strength).round().astype(np.uint8)


def draw_boxes(image, boxes, colors: Sequence[str] = COLORS, scale: int = 1) -> np.ndarray:
    """The image, `scale` times as large, with boxes (N, 4) x0, y0, x1, y1, upper edge exclusive."""
    picture = Image.fromarray(as_image(image))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)
    pen = ImageDraw.Draw(picture)
    boxes = _array(boxes).astype(float).reshape(-1, 4) * scale
    boxes = boxes.clip(-9, max(picture.size) + 9)             # edges outside are not seen
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        if x1 > x0 and y1 > y0:
            pen.rectangle([x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)],
                          outline=colors[number % len(colors)], width=2)
    return np.asarray(picture)


def image_grid(path: str | Path, images: Sequence, titles: Sequence[str] | None = None,
               columns: int = 8, cell: int = 128, gap: int = 6) -> None:
    """Write the images in rows of `columns`, each resized to `cell` pixels, below its title."""
    if not len(images) or columns < 1 or cell < 1:
        raise ValueError("images must not be empty, columns and cell at least 1, not "
                         f"{len(images)}, {columns} and {cell}")
    columns = min(columns, len(images))
    head = 18 if titles is not None else 0
    rows = -(-len(images) // columns)
    size = (columns * (cell + gap) + gap, rows * (cell + gap + head) + gap)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, image in enumerate(images):
        picture = Image.fromarray(as_image(image))
        factor = cell / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.NEAREST if factor > 2 else Image.BICUBIC)
        x, y = gap + number % columns * (cell + gap), gap + number // columns * (cell + gap + head)
        if titles is not None and number < len(titles):
            pen.text((x, y), _cut(str(titles[number]), cell - 4, 12), fill=INK, font=font)
        canvas.paste(picture, (x, y + head))
    _write(canvas, path)


# ---------------------------------------------------------------- charts

class Chart:
    """Axes with ticks, a title and a legend. All drawing is in data coordinates."""

    def __init__(self, xlim: tuple[float, float], ylim: tuple[float, float], *, title: str = "",
                 xlabel: str = "", ylabel: str = "", logx: bool = False, logy: bool = False,
                 size: tuple[int, int] = (640, 420),
                 xticks: Sequence[tuple[float, str]] | None = None,
                 yticks: Sequence[tuple[float, str]] | None = None):
        self.size, self.logs = size, (logx, logy)
        self.limits = tuple(_limits(limit, log) for limit, log in zip((xlim, ylim), self.logs))
        self.canvas = Image.new("RGB", (size[0] * ZOOM, size[1] * ZOOM), "white")
        self.pen = ImageDraw.Draw(self.canvas)
        self.legend: list[tuple[str, str]] = []
        xticks = _ticks(*self.limits[0], logx) if xticks is None else list(xticks)
        yticks = _ticks(*self.limits[1], logy) if yticks is None else list(yticks)
        left = max((_width(label, 12) for _, label in yticks), default=0) + 12 + 18 * bool(ylabel)
        left, right, top = max(64, math.ceil(left)), size[0] - 16, 34 if title else 14
        labels = [_wrap(label, (right - left) / len(xticks) - 6) for _, label in xticks]
        upright = sum("…" in label for label in labels) > len(labels) / 2
        if upright:
            labels = [_cut(label, size[1] / 4, 12) for _, label in xticks]
            room = max(_width(label, 12) for label in labels) - 12
        else:
            room = 15 * max((label.count("\n") for label in labels), default=0)
        self.box = (left, top, right, size[1] - (50 if xlabel else 32) - math.ceil(room))
        for x, label in _apart((self._pixel(v, 0), label) for (v, _), label in zip(xticks, labels)):
            self._stroke([(x, self.box[1]), (x, self.box[3])], GRID, 1)
            if upright:
                self._upright(x, self.box[3] + 4, label, 12)
            else:
                self._label(x, self.box[3] + 4, label, "ma", 12)
        for y, label in _apart((self._pixel(v, 1), label) for v, label in yticks):
            self._stroke([(self.box[0], y), (self.box[2], y)], GRID, 1)
            self._label(self.box[0] - 6, y, label, "rm", 12)
        self._label((left + right) / 2, 8, _cut(title, right - left, 15), "ma", 15)
        self._label((left + right) / 2, size[1] - 8, _cut(xlabel, right - left, 13), "md", 13)
        if ylabel:
            ylabel = _cut(ylabel, size[1] - 8, 13)
            at = (self.box[1] + self.box[3] - _width(ylabel, 13)) / 2
            self._upright(11, min(max(at, 2), size[1] - _width(ylabel, 13) - 2), ylabel, 13)
        self.frame()

    def frame(self) -> None:
        x0, y0, x1, y1 = self.box
        self._stroke([(x0, y0), (x0, y1), (x1, y1)], INK, 1)

    def line(self, x, y, color: str = COLORS[0], label: str = "", width: float = 2,
             dashed: bool = False) -> None:
        """A polyline, cut off at the axes; gaps where a value is not finite (or not positive on a
        log axis)."""
        self._remember(label, color)
        run: list[tuple[float, float]] = []
        for px, py in [*self._points(x, y, beyond=9), (math.nan, math.nan)]:
            if math.isfinite(px) and math.isfinite(py):
                run.append((px, py))
                continue
            for piece in _dashes(run) if dashed and len(run) > 1 else [run]:
                self._curve(piece, color, width)
            run = []

    def points(self, x, y, color: str = COLORS[0], label: str = "", radius: float = 3) -> None:
        self._remember(label, color)
        for px, py in self._points(x, y):
            if math.isfinite(px) and math.isfinite(py):
                self._dot(px, py, color, radius)

    def band(self, x, low, high, color: str = COLORS[0]) -> None:
        """A translucent band between two curves (error bars of a line); on a log axis what is not
        positive is at the lower end."""
        low = np.maximum(low, self.limits[1][0]) if self.logs[1] else low
        edge = [p for p in [*self._points(x, low), *reversed(self._points(x, high))]
                if all(map(math.isfinite, p))]
        if len(edge) > 2:
            layer = Image.new("L", self.canvas.size, 0)
            ImageDraw.Draw(layer).polygon([(px * ZOOM, py * ZOOM) for px, py in edge], fill=50)
            self.canvas.paste(color, mask=layer)

    def bar(self, x: float, height: float, width: float, color: str = COLORS[0],
            error: float | None = None, base: float = 0) -> None:
        if not math.isfinite(height):
            return
        (x0, y0), (x1, y1) = self._points([x - width / 2, x + width / 2],
                                          [max(base, height), min(base, height)])
        self.pen.rectangle([x0 * ZOOM, y0 * ZOOM, x1 * ZOOM, y1 * ZOOM], fill=color)
        if error:
            self._stroke(self._points([x, x], [height - error, height + error]), INK, 1.5)

    def ellipse(self, x: float, y: float, rx: float, ry: float, color: str = COLORS[0],
                width: float = 1.5) -> None:
        """An axis-aligned ellipse with half-axes rx, ry in data units."""
        turn = np.linspace(0, 2 * math.pi, 64)
        self.line(x + rx * np.cos(turn), y + ry * np.sin(turn), color, width=width)

    def text(self, x: float, y: float, text: str, color: str = INK, anchor: str = "lm") -> None:
        (px, py), = self._points([x], [y])
        self._label(px, py, text, anchor, 12, color)

    def save(self, path: str | Path) -> None:
        """Write a PNG, the legend in the emptiest corner, or beside the axes if all hold marks."""
        if self.legend:
            self._draw_legend()
        self.frame()
        _write(self.canvas.resize(self.size, Image.LANCZOS), path)

    def _draw_legend(self) -> None:
        x0, y0, x1, y1 = self.box
        room = max(1, int((y1 - y0 - 18) / 18))               # lines
        rows = [(_cut(label, x1 - x0 - 50, 12), color) for label, color in self.legend[:room]]
        if len(self.legend) > room:
            rows[-1] = (f"and {len(self.legend) - room + 1} more", "white")
        width, height = max(_width(label, 12) for label, _ in rows) + 36, 18 * len(rows) + 6
        corners = [(x, y) for y in (y0 + 6, y1 - height - 6) for x in (x1 - width - 6, x0 + 8)]
        pixels = np.asarray(self.canvas).astype(int)
        ink = (pixels.max(-1) - pixels.min(-1) > 12) | (pixels.max(-1) < 120)

        def marks(corner):
            x, y = (int(v * ZOOM) for v in corner)
            return ink[max(y, 0):y + int(height * ZOOM), max(x, 0):x + int(width * ZOOM)].sum()

        x, y = min(corners, key=marks)
        if marks((x, y)) > 0.003 * width * height * ZOOM**2:
            x, y, self.size = self.size[0] - 4, y0, (self.size[0] + int(width) + 8, self.size[1])
            wider = Image.new("RGB", (self.size[0] * ZOOM, self.size[1] * ZOOM), "white")
            wider.paste(self.canvas)
            self.canvas, self.pen = wider, ImageDraw.Draw(wider)
        self.pen.rectangle([x * ZOOM, y * ZOOM, (x + width) * ZOOM, (y + height) * ZOOM],
                           fill="white", outline=GRID, width=ZOOM)
        for number, (label, color) in enumerate(rows):
            middle = y + 12 + 18 * number
            self._stroke([(x + 6, middle), (x + 24, middle)], color, 3)
            self._label(x + 30, middle, label, "lm", 12)

    def _remember(self, label: str, color: str) -> None:
        if label and (label, color) not in self.legend:
            self.legend.append((label, color))

    def _pixel(self, value: float, axis: int, beyond: float = 0.02) -> float:
        low, high = self.limits[axis]
        if self.logs[axis]:
            if not value > 0:
                return math.nan
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        at = (value - low) / (high - low)
        at = min(max(at, -beyond), 1 + beyond) if math.isfinite(at) else math.nan    # on the edge
        x0, y0, x1, y1 = self.box
        return x0 + at * (x1 - x0) if axis == 0 else y1 - at * (y1 - y0)

    def _points(self, x, y, beyond: float = 0.02) -> list[tuple[float, float]]:
        return [(self._pixel(float(a), 0, beyond), self._pixel(float(b), 1, beyond))
                for a, b in zip(x, y, strict=True)]

    def _stroke(self, points, color: str, width: float) -> None:
        self.pen.line([(x * ZOOM, y * ZOOM) for x, y in points], fill=color,
                      width=max(1, round(width * ZOOM)), joint="curve")

    def _curve(self, points, color: str, width: float) -> None:
        """A stroke within the axes; a dot if it leads nowhere."""
        x0, y0, x1, y1 = self.box
        before = None
        if not all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in points):
            before = self.canvas.copy()
        if len(set(points)) == 1:
            self._dot(*points[0], color, width)
        elif points:
            self._stroke(points, color, width)
        if before is not None:
            axes = (x0 * ZOOM, y0 * ZOOM, x1 * ZOOM, y1 * ZOOM)
            before.paste(self.canvas.crop(axes), axes)
            self.canvas.paste(before)

    def _dot(self, x: float, y: float, color: str, radius: float) -> None:
        corners = (x - radius, y - radius, x + radius, y + radius)
        self.pen.ellipse([value * ZOOM for value in corners], fill=color)

    def _label(self, x: float, y: float, text: str, anchor: str, size: int,
               color: str = INK) -> None:
        style = {"anchor": anchor, "align": "center", "font": ImageFont.load_default(size * ZOOM)}
        x0, _, x1, _ = self.pen.textbbox((x * ZOOM, y * ZOOM), text, **style)
        inside = max(0, 4 - x0) - max(0, x1 + 4 - self.canvas.width)
        self.pen.text((x * ZOOM + inside, y * ZOOM), text, fill=color, **style)

    def _upright(self, x: float, top: float, text: str, size: int) -> None:
        """Text that reads upwards, its middle at x, its end at `top`."""
        font = ImageFont.load_default(size * ZOOM)
        tile = Image.new("RGB", (int(font.getlength(text)) + 4, int(1.4 * size) * ZOOM), "white")
        ImageDraw.Draw(tile).text((0, 0), text, fill=INK, font=font)
        tile = tile.rotate(90, expand=True)
        self.canvas.paste(tile, (round(x * ZOOM - tile.width / 2), round(top * ZOOM)))


@np.errstate(invalid="ignore")                                # infinity less infinity
def line_chart(path: str | Path, series: dict[str, tuple], *, markers: bool = False,
               xlim: tuple[float, float] | None = None, ylim: tuple[float, float] | None = None,
               **axes) -> None:
    """`series`: name -> (x, y) or (x, y, error), drawn as a band. Other keywords as for Chart."""
    series = {name: [np.asarray(v, dtype=float) for v in values] for name, values in series.items()}
    signs = (0, 1) if axes.get("logy") else (-1, 1)
    edges = [v[1] + sign * (v[2] if len(v) > 2 else 0) for v in series.values() for sign in signs]
    chart = Chart(xlim or _span([v[0] for v in series.values()], axes.get("logx")),
                  ylim or _span(edges, axes.get("logy")), **axes)
    for color, (name, (x, y, *error)) in zip(_cycle(len(series)), series.items()):
        if error:
            chart.band(x, y - error[0], y + error[0], color)
        chart.line(x, y, color, name)
        if markers:
            chart.points(x, y, color)
    chart.save(path)


def scatter_chart(path: str | Path, series: dict[str, tuple], *, radius: float = 3, xlim=None,
                  ylim=None, **axes) -> None:
    """`series`: name -> (x, y). Keywords as for Chart."""
    series = {name: [np.asarray(v, dtype=float) for v in values] for name, values in series.items()}
    chart = Chart(xlim or _span([v[0] for v in series.values()], axes.get("logx")),
                  ylim or _span([v[1] for v in series.values()], axes.get("logy")), **axes)
    for color, (name, (x, y)) in zip(_cycle(len(series)), series.items()):
        chart.points(x, y, color, name, radius)
    chart.save(path)


def bar_chart(path: str | Path, labels: Sequence[str], series: dict[str, Sequence], *, ylim=None,
              **axes) -> None:
    """Groups of bars, one group per label; `series`: name -> values or (values, errors)."""
    split = {name: v if isinstance(v, tuple) else (v, [0.0] * len(v)) for name, v in series.items()}
    if not len(labels) or not split or any(len(v) != len(labels) for v, _ in split.values()):
        raise ValueError(f"each series must have {len(labels)} values, one per label, and there "
                         "must be a label and a series")
    split = {name: (np.asarray(v, dtype=float), np.nan_to_num(np.asarray(e, dtype=float)))
             for name, (v, e) in split.items()}
    low, high = _extent(np.array([(v - e, v + e, 0 * e) for v, e in split.values()]))
    if len(split) > 1:                                        # room for the legend above the bars
        high += (high - low) * 24 * (len(split) + 1) / axes.get("size", (640, 420))[1]
    axes.setdefault("xticks", list(enumerate(map(str, labels))))
    limits = (low * 1.08, high * 1.08) if high > low else (0.0, 1.0)
    if axes.get("logy"):
        limits = _span([v for v, _ in split.values()], True)
    chart = Chart((-0.5, len(labels) - 0.5), ylim or limits, **axes)
    width = min(0.8 / len(split), 0.2 * len(labels))          # a lone bar is no wall
    base = chart.limits[1][0] if ylim or axes.get("logy") else 0
    for number, (color, (name, pair)) in enumerate(zip(_cycle(len(split)), split.items())):
        offset = (number - (len(split) - 1) / 2) * width
        for at, (value, error) in enumerate(zip(*pair)):
            chart.bar(at + offset, value, width * 0.92, color, error, base)
        if len(split) > 1:
            chart._remember(name, color)
    chart.save(path)


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _extent(values: np.ndarray) -> tuple[float, float] | None:
    """The smallest and the largest finite value; None if there is none."""
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else None


def _span(arrays: Sequence[np.ndarray], log: bool | None) -> tuple[float, float]:
    values = np.concatenate([np.ravel(a) for a in arrays]) if arrays else np.zeros(0)
    extent = _extent(values[values > 0] if log else values)
    if extent is None:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = extent
    if log:
        return low / 1.1, high * 1.1
    room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def _limits(limit: tuple[float, float], log: bool) -> tuple[float, float]:
    low, high = map(float, limit)
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high or (log and low <= 0):
        raise ValueError(f"limits must be finite, increasing, positive on a log axis, not {limit}")
    return low, high


def _ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    if log and math.log10(high / low) >= 1:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        if last - first < 2:
            powers = [(m, e) for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        else:
            powers = [(1, e) for e in range(first, last + 1, max(1, (last - first) // 6))]
        return [(m * 10.0**e, f"{m}e{e}" if abs(e) > 3 else f"{m * 10.0**e:g}") for m, e in powers
                if low <= m * 10.0**e * (1 + 1e-9) and m * 10.0**e <= high * (1 + 1e-9)]
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    marks = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
    # enough digits for neighbours to differ
    digits = max(6, math.ceil(math.log10(max(abs(low), abs(high)) / step)) + 2)
    return [(float(m), f"{m if abs(m) > step / 1e6 else 0:.{digits}g}") for m in marks]


def _apart(ticks: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """(pixel, label) without those that would touch the one before."""
    kept = []
    for at, label in ticks:
        if not kept or abs(at - kept[-1][0]) >= 13:
            kept.append((at, label))
    return kept


def _width(text: str, size: int) -> float:
    return ImageFont.load_default(size * ZOOM).getlength(text) / ZOOM


def _cut(text: str, width: float, size: int) -> str:
    """The text, or as much of its beginning as is `width` pixels wide, with an ellipsis."""
    while len(text) > 2 and _width(text, size) > width:
        text = text[:-2] + "…"
    return text


def _wrap(text: str, width: float) -> str:
    """A tick's label in up to three lines of `width` pixels, broken at blanks."""
    lines = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}", 12) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(_cut(line, width, 12) for line in [*lines[:2], " ".join(lines[2:])] if line)


def _dashes(points: list[tuple[float, float]], dash: float = 6) -> list[list[tuple[float, float]]]:
    """Cut a polyline into dashes of `dash` pixels with gaps of the same length."""
    p = np.array(points)
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(p, axis=0).T))])
    dashes = []
    for start in np.arange(0, along[-1], 2 * dash):
        end = min(start + dash, along[-1])
        at = np.concatenate([[start], along[(along > start) & (along < end)], [end]])
        dashes.append(list(zip(np.interp(at, along, p[:, 0]), np.interp(at, along, p[:, 1]))))
    return dashes


def _write(image: Image.Image, path: str | Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG", optimize=True))
