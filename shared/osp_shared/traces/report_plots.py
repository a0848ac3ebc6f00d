"""Pictures of the HTML report: SVG charts as text, and small PNG images as data URIs. numpy and zlib only."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

from osp_shared.traces.report_text import number

# Fraction of the bound -> colour: calm up to a quarter, warm towards one, red beyond it.
STOPS = ((0.0, (222, 240, 233)), (0.1, (166, 217, 196)), (0.25, (126, 196, 170)), (0.5, (240, 214, 124)),
         (1.0, (238, 160, 77)), (1.0001, (214, 69, 65)), (100.0, (122, 16, 48)))  # fmt: skip
LOCAL, TOTAL, BOUND, YARDSTICK, BAD = "#1d6fa5", "#8a5fbf", "#d9534f", "#9aa5b1", "#c9302c"
# Magnitude -> colour of heat maps: black through violet and orange to pale yellow.
HEAT = np.array(
    [[8, 6, 28], [60, 15, 92], [137, 34, 106], [204, 63, 72], [246, 128, 35], [250, 196, 63], [252, 253, 191]]
)


def colour(fraction: float) -> str:
    if math.isinf(fraction) or math.isnan(fraction):
        return "#7a1030"
    for (low, a), (high, b) in zip(STOPS, STOPS[1:], strict=False):
        if fraction <= high:
            t = max(0.0, (fraction - low) / (high - low))
            return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in zip(a, b, strict=True))
    return "#7a1030"


def png(pixels_HWC: np.ndarray) -> str:
    """data: URI of uint8 RGB pixels."""
    height, width, _ = pixels_HWC.shape
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(pixels_HWC, dtype=np.uint8))

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()


def heat(value_HW: np.ndarray, top: float | None = None) -> np.ndarray:
    """RGB pixels of non-negative values; `top` is shown in the last colour."""
    finite = np.where(np.isfinite(value_HW), value_HW, np.inf)
    top = top or float(np.max(finite[np.isfinite(finite)], initial=0.0)) or 1.0
    position = np.clip(np.nan_to_num(finite / top, posinf=1.0), 0, 1) * (len(HEAT) - 1)
    low = np.minimum(position.astype(int), len(HEAT) - 2)
    mix = (position - low)[..., None]
    return (HEAT[low] * (1 - mix) + HEAT[low + 1] * mix).astype(np.uint8)


def image(pixels_HWC: np.ndarray, width: int, title: str = "") -> str:
    return f'<img src="{png(pixels_HWC)}" style="width:{width}px" alt="{escape(title)}" title="{escape(title)}">'


class LogAxis:
    """Maps positive values to pixels; zero and below sit on the lowest line."""

    def __init__(self, values: Sequence[float], low_px: float, high_px: float):
        good = [v for v in values if v > 0 and math.isfinite(v)] or [1e-8, 1e-6]
        self.low = math.floor(math.log10(min(good)) - 0.2)
        self.high = max(math.ceil(math.log10(max(good)) + 0.2), self.low + 2)
        self.low_px, self.high_px = low_px, high_px

    def __call__(self, value: float) -> float:
        if not value > 0:
            return self.low_px
        exponent = self.high if math.isinf(value) else min(max(math.log10(value), self.low), self.high)
        return self.low_px + (exponent - self.low) / (self.high - self.low) * (self.high_px - self.low_px)

    def ticks(self) -> list[int]:
        step = max(1, (self.high - self.low) // 6)
        return list(range(self.low, self.high + 1, step))


def power(exponent: int) -> str:
    return f'10<tspan dy="-4" font-size="8">{exponent}</tspan>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def depth_chart(points: Sequence[dict], width: int = 1040, height: int = 300) -> str:
    """Error along execution order. points: title, path, local, total, yardstick, bound, failed."""
    left, right, top, bottom = 52, 16, 14, 34
    values = [p[k] for p in points for k in ("local", "total", "yardstick", "bound")]
    y = LogAxis(values, height - bottom, top)
    span = (width - left - right) / max(1, len(points) - 1)
    xs = [left + i * span for i in range(len(points))]
    out = [f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="error along depth">']
    for e in y.ticks():
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(10.0**e):.1f}" y2="{y(10.0**e):.1f}" class="grid"/>')
        out.append(f'<text x="{left - 8}" y="{y(10.0**e) + 4:.1f}" text-anchor="end">{power(e)}</text>')
    out += _group_labels(points, xs, height, bottom)
    allowed = [(x, y(p["bound"])) for x, p in zip(xs, points, strict=True)]
    out.append(f'<path d="{_path([*allowed, (xs[-1], top), (xs[0], top)])} Z" fill="{BOUND}" opacity=".07"/>')
    out.append(f'<path d="{_path(allowed)}" fill="none" stroke="{BOUND}" stroke-width="1" stroke-dasharray="4 3"/>')
    for key, ink, wide_px in (("yardstick", YARDSTICK, 1.0), ("total", TOTAL, 1.6)):
        line = [(x, y(p[key])) for x, p in zip(xs, points, strict=True) if p[key] > 0]
        if line:
            out.append(f'<path d="{_path(line)}" fill="none" stroke="{ink}" stroke-width="{wide_px}"/>')
    for x, p in zip(xs, points, strict=True):
        if not p["local"] > 0:  # exact (a copy, a reshape) or not measured
            continue
        radius, ink = (5.5, BAD) if p["failed"] else (2.4, LOCAL)
        tip = f"{p['title']}: local {number(p['local'])}, bound {number(p['bound'])}, total {number(p['total'])}"
        circle = f'<circle cx="{x:.1f}" cy="{y(p["local"]):.1f}" r="{radius}" fill="{ink}">'
        out.append(f"{circle}<title>{escape(tip)}</title></circle>")
    first = next((i for i, p in enumerate(points) if p["failed"]), None)
    if first is not None:
        px, p = xs[first], points[first]
        anchor, shift = ("end", -9) if px > width * 0.6 else ("start", 9)
        out.append(f'<text x="{px + shift:.1f}" y="{max(top + 12, y(p["local"]) - 8):.1f}" text-anchor="{anchor}" '
                   f'class="callout">{escape(p["title"])}</text>')  # fmt: skip
    return "".join(out) + "</svg>"


def _group_labels(points: Sequence[dict], xs: Sequence[float], height: int, bottom: int) -> list[str]:
    """Names of the top-level parts under the axis, where there is room for them."""
    out, start, used = [], 0, -1e9
    names = [group(p["path"]) for p in points]
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[start]:
            middle, room = (xs[start] + xs[i - 1]) / 2, 5.6 * len(names[start])
            if start:
                edge = (xs[start] + xs[start - 1]) / 2
                out.append(f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="14" y2="{height - bottom}" class="edge"/>')
            if middle - room / 2 > used and xs[i - 1] - xs[start] > room * 0.45:
                out.append(f'<text x="{middle:.1f}" y="{height - bottom + 18}" text-anchor="middle">'
                           f"{escape(names[start])}</text>")  # fmt: skip
                used = middle + room / 2 + 6
            start = i
    return out


def group(path: str) -> str:
    """Top-level part of a path: `transformer_blocks.3` or `decoder.up1`."""
    parts = path.replace("/", ".").split(".")
    return ".".join(parts[:2]) if len(parts) > 1 else parts[0] or "(model)"


def butterfly(rows: Sequence[dict], width: int = 1040) -> str:
    """Local error to the left, inherited to the right of each layer's name."""
    name_w, line, top = 330, 19, 26
    half = (width - name_w) / 2 - 8
    axis = LogAxis([r[k] for r in rows for k in ("local", "inherited", "bound")], 0, half)
    mid_l, mid_r = half + 8, half + 8 + name_w
    height = top + line * len(rows) + 8
    out = [f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="local and inherited error">']
    out.append(f'<text x="{mid_l - 8}" y="14" text-anchor="end" class="head">local: made here</text>')
    out.append(f'<text x="{mid_r + 8}" y="14" class="head">inherited: made before</text>')
    for e in axis.ticks():
        for x in (mid_l - axis(10.0**e), mid_r + axis(10.0**e)):
            out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height - 6}" class="grid"/>')
    for i, r in enumerate(rows):
        y = top + i * line
        local, inherited = axis(r["local"]), axis(r["inherited"])
        out.append(f'<rect x="{mid_l - local:.1f}" y="{y}" width="{local:.1f}" height="13" rx="2" '
                   f'fill="{BAD if r["failed"] else LOCAL}"/>')  # fmt: skip
        x = mid_l - axis(r["bound"])
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 2}" y2="{y + 15}" stroke="{BOUND}" stroke-width="2"/>')
        bar = f'<rect x="{mid_r}" y="{y}" width="{inherited:.1f}" height="13" rx="2"'
        out.append(f'{bar} fill="{TOTAL}" opacity=".85"/>')
        long = inherited > half - 110  # no room for the number behind the bar
        end = f"{mid_r + inherited + (-5 if long else 5):.1f}"
        place = f'x="{end}" text-anchor="end" fill="#fff"' if long else f'x="{end}"'
        told = f"{number(r['inherited'])}{growth(r['amplification'])}"
        out.append(f'<text {place} y="{y + 10}" class="small">{told}</text>')
        shift, anchor, shade = (-5, "start", "#fff") if local > 48 else (5, "end", "#52606d")
        out.append(f'<text x="{mid_l - local - shift:.1f}" y="{y + 10}" class="small" text-anchor="{anchor}" '
                   f'fill="{shade}">{number(r["local"])}</text>')  # fmt: skip
        ink = f' fill="{BAD}" font-weight="600"' if r["failed"] else ""
        title = r["title"] if len(r["title"]) < 52 else "…" + r["title"][-51:]
        out.append(f'<text x="{(mid_l + mid_r) / 2}" y="{y + 10}" text-anchor="middle"{ink}>{escape(title)}</text>')
    return "".join(out) + "</svg>"


def growth(amplification: float) -> str:
    return "" if math.isnan(amplification) else f" ×{number(amplification)}"


def histogram(error: np.ndarray, unit: float, width: int = 500, height: int = 190) -> str:
    """Signed errors in units of `unit` (the bound on the largest), with the bound's edges where they are in sight."""
    left, bottom = 8, 26
    scaled = error[np.isfinite(error)].ravel() / unit if unit > 0 else error[np.isfinite(error)].ravel()
    limit = 1.05 * float(np.max(np.abs(scaled), initial=0.0)) or 1.0
    counts, edges = np.histogram(np.clip(scaled, -limit, limit), bins=61, range=(-limit, limit))
    peak = math.log1p(max(1, counts.max()))

    def x(v: float) -> float:
        return left + (v + limit) / (2 * limit) * (width - 2 * left)

    out = [f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="histogram of errors">']
    edge = min(1.0, limit)
    inside = f'x="{x(-edge):.1f}" y="6" width="{x(edge) - x(-edge):.1f}" height="{height - bottom - 6}"'
    out.append(f'<rect {inside} fill="#e9f5f0"/>')
    for count, a, b in zip(counts, edges, edges[1:], strict=False):
        tall = math.log1p(count) / peak * (height - bottom - 10)
        ink = LOCAL if abs(a + b) / 2 <= 1 else BAD
        out.append(f'<rect x="{x(a) + 0.5:.1f}" y="{height - bottom - tall:.1f}" width="{x(b) - x(a) - 1:.1f}" '
                   f'height="{tall:.1f}" fill="{ink}"/>')  # fmt: skip
    marks = (-1, 0, 1) if 1 <= limit < 8 else (-limit / 1.05, 0, limit / 1.05)
    for v in marks:
        text = "0" if v == 0 else f"{'-' if v < 0 else ''}{number(abs(v))}"
        place = min(max(x(v), 24), width - 24)
        out.append(f'<text x="{place:.1f}" y="{height - 9}" text-anchor="middle">{text}</text>')
    return "".join(out) + "</svg>"


def profile(values: np.ndarray, label: str, limit: float, width: int = 240, height: int = 92) -> str:
    """Largest error at each index of one axis, against the bound: shows an edge, a frame, a channel."""
    left, bottom, top = 6, 18, 8
    top_value = max(float(values.max(initial=0.0)), limit) or 1.0
    step = (width - 2 * left) / len(values)
    out = [f'<svg viewBox="0 0 {width} {height}" class="chart profile" role="img" aria-label="{escape(label)}">']
    for i, v in enumerate(values):
        tall = v / top_value * (height - bottom - top)
        box = f'x="{left + i * step:.1f}" y="{height - bottom - tall:.1f}" width="{max(step * 0.86, 0.6):.2f}"'
        out.append(f'<rect {box} height="{tall:.1f}" fill="{BAD if v > limit else LOCAL}"/>')
    y = height - bottom - limit / top_value * (height - bottom - top)
    line = f'x1="{left}" x2="{width - left}" y1="{y:.1f}" y2="{y:.1f}"'
    out.append(f'<line {line} stroke="{BOUND}" stroke-dasharray="4 3"/>')
    out.append(f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>')
    return "".join(out) + "</svg>"
