"""The ratchet: error over bound of every kind of layer in every parity run, in one committed file.

A figure may fall at any time and rise only with a reason written beside it. Rounding differs a little between CPUs, so
a figure counts as grown when it exceeds the committed one by HEADROOM, and as loose when it is below it by SLACK.

    {"wfvae-decode float32": {"silu": {"fraction": 0.70}, "LayerNorm": {"fraction": 0.33, "reason": "..."}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.traces.ledger import Result

HEADROOM = 1.3
SLACK = 2.0
SMALL = 0.05  # fractions below this are all the same


@dataclass
class Verdict:
    grown: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.grown or self.new)


def observed(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Run -> kind of layer (or kernel) -> its worst local error over bound."""
    found: dict[str, dict[str, float]] = {}
    for item in results:
        kinds = found.setdefault(item.name, {})
        for row in item.judged.rows:
            kind = row.record.type if row.record.kind == "output" else row.record.kind
            kinds[kind] = max(kinds.get(kind, 0.0), row.fraction)
    return found


def read(path: Path) -> dict[str, dict[str, dict]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for kinds in content.values():
            for entry in kinds.values():
                float(entry["fraction"])
    except OSError as error:
        raise OspError(f"{path}: {error.strerror}; write it with `osp parity --update_ratchet`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OspError(f"{path}: not a ratchet file ({error})") from None
    return content


def check(found: Mapping[str, Mapping[str, float]], kept: Mapping[str, Mapping[str, Mapping]]) -> Verdict:
    """What grew beyond the committed figures, what has none, and what could be tightened."""
    verdict = Verdict()
    for run, kinds in found.items():
        for kind, fraction in kinds.items():
            entry = kept.get(run, {}).get(kind)
            if entry is None:
                verdict.new.append(f"{run} {kind}: {fraction:.3f}, no committed figure")
            elif fraction > max(SMALL, entry["fraction"]) * HEADROOM:
                verdict.grown.append(f"{run} {kind}: {fraction:.3f}, committed {entry['fraction']:.3f}")
            elif entry["fraction"] > SMALL and fraction * SLACK < entry["fraction"]:
                verdict.loose.append(f"{run} {kind}: {fraction:.3f}, committed {entry['fraction']:.3f}")
    return verdict


def write(path: Path, found: Mapping[str, Mapping[str, float]], kept: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Write new figures; a reason stays beside its figure."""
    content = {
        run: {
            kind: {
                **({"reason": kept[run][kind]["reason"]} if "reason" in kept.get(run, {}).get(kind, {}) else {}),
                "fraction": math.ceil(fraction * 1000) / 1000 if math.isfinite(fraction) else 1.0,
            }
            for kind, fraction in sorted(kinds.items())
        }
        for run, kinds in sorted(found.items())
    }
    path.write_text(json.dumps({**{k: v for k, v in kept.items() if k not in content}, **content}, indent=1) + "\n")
