"""The HTML report: one file, no script, no network. See it as a page of pictures with the numbers beside them.

Per model: the verdict in a sentence; error along depth; local and inherited error side by side; the module tree
coloured by fraction of the bound; the worst layer's error as histogram, heat map and profile along each axis; for a
decoder the frames whose pixels differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from osp_shared.traces import report_plots as plots
from osp_shared.traces.compare import Row
from osp_shared.traces.ledger import Result
from osp_shared.traces.metrics import wide
from osp_shared.traces.report_text import number

STYLE = """
:root{--ink:#1f2933;--soft:#616e7c;--line:#e4e7eb;--paper:#fff;--back:#f5f7fa}
*{box-sizing:border-box}body{margin:0;background:var(--back);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:28px 24px 60px}h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:0}
h3{font-size:14px;margin:26px 0 6px}p{margin:4px 0}.soft{color:var(--soft)}a{color:inherit;text-decoration:none}
.pill{display:inline-block;padding:1px 11px;border-radius:99px;font-weight:600;font-size:13px;vertical-align:3px}
.ok{background:#d9f2e6;color:#0b6b45}.bad{background:#fbe0df;color:#a51d1a}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(205px,1fr));gap:12px;margin:20px 0}
.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:12px 14px;display:block}
.card b{font-size:15px}.meter{height:7px;border-radius:4px;background:#e9edf1;margin:8px 0 5px;overflow:hidden}
.meter i{display:block;height:100%;border-radius:4px}section{background:var(--paper);border:1px solid var(--line);
border-radius:12px;padding:20px 24px 24px;margin:18px 0}.verdict{padding:9px 14px;border-radius:8px;margin:12px 0}
svg.chart{width:100%;height:auto;display:block;font:11px system-ui,sans-serif;fill:#52606d}svg.profile{width:240px}
.grid{stroke:#e9edf1}.edge{stroke:#cbd2d9;stroke-dasharray:2 4}.callout{fill:#a51d1a;font-weight:600}
.head{font-weight:600;fill:#323f4b}.small{font-size:10px}.legend span{margin-right:18px;white-space:nowrap}
.legend i{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:6px;vertical-align:3px}
.tree{font:12.5px/1.35 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;columns:2;column-gap:28px}
.tree .leaf{break-inside:avoid}.tree{overflow-wrap:anywhere}.tree details>*:not(summary){margin-left:15px}
.tree summary{cursor:pointer}.tree .leaf{padding-left:13px}
.chip{display:inline-block;min-width:50px;padding:0 6px;margin:1px 8px 1px 0;border-radius:4px;text-align:right;
font-size:11.5px;color:#1f2933}.chip.hot{color:#fff;font-weight:600}.kind{color:#9aa5b1;margin-left:6px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:26px;align-items:start}.flow{display:flex;flex-wrap:wrap;gap:14px}
figure{margin:0 0 12px}
.heat img{height:190px}figcaption{font-size:12px;color:var(--soft)}
img{image-rendering:pixelated;border-radius:4px;display:block}
table{border-collapse:collapse;font-size:12.5px;width:100%}td,th{padding:3px 9px;border-bottom:1px solid var(--line);
text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}
th{font-weight:600;color:var(--soft)}
"""

SHOWN = 22  # layers in the side-by-side chart


def html(results: Sequence[Result], title: str, about: Mapping[str, str]) -> str:
    """The page as text. `about` is shown under the title: versions, machine, seeds."""
    passed = all(item.passed for item in results)
    facts = " · ".join(f"{escape(k)} {escape(str(v))}" for k, v in about.items())
    body = [
        f'<h1>{escape(title)} {_pill(passed)}</h1><p class="soft">{facts}</p>',
        f'<p class="soft">{_meaning(results)}</p>',
        '<div class="cards">', *(_card(item) for item in results), "</div>",
        *(_section(item) for item in results),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _meaning(results: Sequence[Result]) -> str:
    if any(not item.judged.has_truth for item in results):
        return "No truth in a wider dtype was given: bounds are the arithmetic’s alone, accumulated along the run."
    return (
        "Truth is the PyTorch reference in float64. A bound is four times the reference’s own error in the "
        "candidate’s dtype, or the arithmetic’s floor."
    )


def _pill(passed: bool) -> str:
    return '<span class="pill ok">within bounds</span>' if passed else '<span class="pill bad">fault found</span>'


def _anchor(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _card(item: Result) -> str:
    share = 100.0 if math.isinf(item.fraction) else min(100.0, 100.0 * item.fraction)
    state = "ok" if item.passed else "bad"
    word = f"{number(item.fraction)} of the bound" if not math.isinf(item.fraction) else "not comparable"
    layers = len({row.record.path for row in item.judged.rows})
    spent = f" · {item.seconds:.1f} s" if item.seconds else ""
    return (
        f'<a class="card" href="#{_anchor(item.name)}"><b>{escape(item.name)}</b> '
        f'<span class="pill {state}" style="float:right">{"ok" if item.passed else "fault"}</span>'
        f'<div class="meter"><i style="width:{max(share, 2):.0f}%;background:{plots.colour(item.fraction)}"></i></div>'
        f'<span class="soft">{word} · {layers} layers{spent}</span></a>'
    )


def _section(item: Result) -> str:
    header = item.judged.candidate.header
    reference = item.judged.reference.header
    parts = [
        f'<section id="{_anchor(item.name)}"><h2>{escape(item.name)} {_pill(item.passed)}</h2>',
        f'<p class="soft">{escape(header.backend)} {escape(header.dtype)} on {escape(header.device)} against '
        f"{escape(reference.backend)} · weights {escape(header.weights[:12])} · inputs {escape(header.inputs[:12])}",
        "</p>",
        f'<p class="verdict {"ok" if item.passed else "bad"}">{escape(_sentence(item))}</p>',
        *(f'<p class="soft">{escape(note)}</p>' for note in item.notes),
    ]
    if item.entries:
        parts += [_depth(item), _sides(item)]
    parts += [_structure(item), "<h3>Modules, coloured by fraction of the bound</h3>", _tree(item)]
    worst = item.judged.worst
    if worst is not None and worst.fraction > 0:
        parts.append(_worst(item, worst))
    parts.append(_frames(item))
    return "".join(parts) + "</section>"


def _sentence(item: Result) -> str:
    if not item.passed:
        return item.verdict[0].upper() + item.verdict[1:] + "."
    worst = item.judged.worst
    if worst is None:
        return "Nothing was compared."
    return f"Every layer is within its bound; the closest is {worst.title} at {number(worst.fraction)}."


def _depth(item: Result) -> str:
    points = [
        {"title": e.row.title, "path": e.path, "local": e.local, "total": e.total, "bound": e.row.bound.rel_l2,
         "yardstick": e.row.yardstick.rel_l2 if e.row.yardstick else math.nan, "failed": e.row.failed}
        for e in item.entries
    ]  # fmt: skip
    legend = "".join(
        f'<span><i style="background:{ink}"></i>{text}</span>'
        for ink, text in (
            (plots.LOCAL, "local: made by the layer itself"), (plots.TOTAL, "total: free run"),
            (plots.YARDSTICK, "reference’s own error"), (plots.BOUND, "bound of the local error"),
        )
    )  # fmt: skip
    return f'<h3>Relative error along depth</h3><p class="legend soft">{legend}</p>{plots.depth_chart(points)}'


def _sides(item: Result) -> str:
    """The failing layers, then the largest, in execution order."""
    measured = [e for e in item.entries if not math.isnan(e.local)]
    if not measured:
        return ""
    chosen = sorted(measured, key=lambda e: (not e.row.failed, -e.fraction))[:SHOWN]
    rows = [
        {"title": e.row.title, "local": e.local, "inherited": e.inherited, "bound": e.row.bound.rel_l2,
         "amplification": e.amplification, "failed": e.row.failed}
        for e in sorted(chosen, key=lambda e: e.row.record.order)
    ]  # fmt: skip
    note = f"the {len(rows)} layers nearest to their bounds; × = growth of the layer’s input error"
    return f'<h3>Local against inherited error <span class="soft">{note}</span></h3>{plots.butterfly(rows)}'


def _structure(item: Result) -> str:
    alignment = item.judged.alignment
    lines = [f"the candidate lacks {record.title}" for record in alignment.missing[:12]]
    lines += [f"only the candidate has {record.title}" for record in alignment.extra[:12]]
    lines += [f"{p.candidate.title}: shape {list(p.candidate.shape)}, expected {list(p.reference.shape)}"
              for p in alignment.misshaped[:12]]  # fmt: skip
    return "<h3>Structure</h3><ul>" + "".join(f"<li>{escape(x)}</li>" for x in lines) + "</ul>" if lines else ""


# ---------------------------------------------------------------------------------------------------------- module tree


def _tree(item: Result) -> str:
    """Nested names; a node has the worst fraction below it and is open while that is the interesting one."""
    root: dict = {}
    for row in item.judged.rows:
        node, owner = root, row.record.parent if row.record.kind == "input" else row.record.path
        for part in [p for p in owner.replace("/", ".").split(".") if p]:
            node = node.setdefault(part, {})
        node.setdefault("", []).append(row)
    return f'<div class="tree">{_branch(root, 0)}</div>'


def _rows_of(node: Mapping) -> list[Row]:
    return [row for key, value in node.items() for row in (value if key == "" else _rows_of(value))]


def _branch(node: Mapping, depth: int) -> str:
    out = []
    for name, child in node.items():
        if name == "":
            continue
        while len(child) == 1 and "" not in child:  # a list with one used entry reads better on one line
            (only, child), = child.items()
            name = f"{name}.{only}"
        rows = _rows_of(child)
        worst = max(rows, key=lambda row: row.fraction)
        kind = next((row.record.type for row in child.get("", []) if row.record.kind == "output"), "")
        tip = f"{worst.title}: {number(worst.fraction)} of the bound"
        hot = " hot" if worst.fraction > 1 else ""
        label = (
            f'<span class="chip{hot}" style="background:{plots.colour(worst.fraction)}" title="{escape(tip)}">'
            f'{number(worst.fraction)}</span>{escape(name)}<span class="kind">{escape(kind)}</span>'
        )
        inner = _branch(child, depth + 1)
        if inner:
            shown = " open" if worst.fraction > 1 or depth < 2 else ""
            out.append(f"<details{shown}><summary>{label}</summary>{inner}</details>")
        else:
            out.append(f'<div class="leaf">{label}</div>')
    return "".join(out)


# ---------------------------------------------------------------------------------------------------------- worst layer


def _worst(item: Result, row: Row) -> str:
    comparison = item.judged
    exact = wide(comparison.truth.value(comparison.truth.by_key[row.record.key]))
    error = wide(comparison.candidate.value(row.record)) - exact
    words = (
        f"relative error {number(row.error.rel_l2)} (bound {number(row.bound.rel_l2)}, from the {row.bound.source}), "
        f"largest {number(row.error.max_abs)}, median {row.ulp[0]:.0f} ulp, shape {list(row.record.shape)}"
    )
    limit = row.bound.max_abs
    profiles = [
        plots.profile(np.nanmax(np.abs(_along(error, axis)), axis=1), f"largest along axis {axis} ({n})", limit)
        for axis, n in enumerate(error.shape) if 1 < n <= 512
    ]  # fmt: skip
    return (
        f"<h3>Layer nearest to its bound: {escape(row.title)}</h3><p class='soft'>{escape(words)}</p>"
        '<div class="pair"><figure>' + plots.histogram(error, limit) +
        "<figcaption>errors in units of their bound (counts on a log scale); blue lies within</figcaption></figure>"
        f"<figure class='heat'>{_heat(error)}<figcaption>absolute error, folded to two axes; dark is none, "
        f"pale is {number(float(np.nanmax(np.abs(error), initial=0.0)))}</figcaption></figure></div>"
        f'<div class="flow">{"".join(profiles)}</div>'
    )  # fmt: skip


def _along(value: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)


def _heat(error: np.ndarray) -> str:
    """Absolute error as an image of at most 512 x 256 cells, blocks reduced by their maximum."""
    flat = np.abs(error)
    if flat.ndim < 2:
        side = max(1, math.isqrt(flat.size))
        plane = np.pad(flat.ravel(), (0, -flat.size % side)).reshape(-1, side) if flat.size else np.zeros((1, 1))
    else:
        # The split that is nearest to a square page.
        cuts = [(math.prod(flat.shape[:i]), math.prod(flat.shape[i:])) for i in range(1, flat.ndim)]
        rows, columns = min(cuts, key=lambda c: abs(math.log(c[1] / max(1, c[0]) / 2)))
        plane = flat.reshape(rows, columns)
    plane = _shrink(_shrink(plane, 256).T, 512).T
    return plots.image(plots.heat(plane), 500, "absolute error")


def _shrink(plane: np.ndarray, limit: int) -> np.ndarray:
    block = -(-plane.shape[0] // limit)
    padded = np.pad(plane, ((0, -plane.shape[0] % block), (0, 0)))
    return padded.reshape(-1, block, plane.shape[1]).max(1)


# --------------------------------------------------------------------------------------------------------------- frames


def _frames(item: Result) -> str:
    """Decoded video: reference, candidate and difference of the frames that differ most."""
    comparison = item.free
    row = comparison.by_key.get((-1, "", 0, "output", "0"))
    if row is None or item.free.candidate.header.model != "wfvae-decode" or len(row.record.shape) != 5:
        return ""
    truth = comparison.truth.value(comparison.truth.by_key[row.record.key])
    if truth.ndim != 5:
        return ""
    exact_CTHW, found_CTHW = wide(truth)[0], wide(comparison.candidate.value(row.record))[0]
    pixels = [np.clip((v * 0.5 + 0.5) * 255, 0, 255).astype(np.uint8) for v in (exact_CTHW, found_CTHW)]
    gap_THW = np.nan_to_num(np.abs(exact_CTHW - found_CTHW), nan=np.inf).max(0)
    per_frame = np.sqrt(np.mean(np.minimum(gap_THW, 1e6) ** 2, axis=(1, 2)))
    changed = (pixels[0] != pixels[1]).any(0).mean((1, 2))
    order = np.argsort(-per_frame, kind="stable")[:3]
    top = float(gap_THW[np.isfinite(gap_THW)].max(initial=0.0))
    rows = "".join(
        f"<tr><td>{t}</td><td>{number(float(per_frame[t]))}</td><td>{number(float(gap_THW[t].max()))}</td>"
        f"<td>{100 * changed[t]:.2f} %</td></tr>" for t in range(len(per_frame))
    )  # fmt: skip
    strips = "".join(
        f"<figure>{_triple(pixels, gap_THW[t], t, top)}<figcaption>frame {t}: reference, candidate, difference "
        f"(pale is {number(top)})</figcaption></figure>" for t in sorted(order)
    )  # fmt: skip
    return (
        '<h3>Frames</h3><div class="pair"><div>' + strips + "</div><div><table><tr><th>frame</th><th>error (rms)</th>"
        f"<th>largest</th><th>8-bit pixels that differ</th></tr>{rows}</table></div></div>"
    )


def _triple(pixels: Sequence[np.ndarray], gap_HW: np.ndarray, frame: int, top: float) -> str:
    views = [np.moveaxis(p[:, frame], 0, -1) for p in pixels] + [plots.heat(gap_HW, top or 1.0)]
    edge = np.full((gap_HW.shape[0], max(1, gap_HW.shape[1] // 24), 3), 255, np.uint8)
    return plots.image(np.concatenate([views[0], edge, views[1], edge, views[2]], axis=1), 500, f"frame {frame}")


