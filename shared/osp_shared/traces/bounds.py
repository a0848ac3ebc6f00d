"""How large an error may be: measured on the reference, with a floor from the arithmetic.

Truth is the reference in float64. The yardstick is the error that the reference itself makes in the candidate's dtype:
a badly conditioned layer is allowed what it costs anyone, and a well conditioned one nothing more. The yardstick alone
fails where the reference happens to be exact or where a few values decide; there the floor counts:

    floor = u_store + u_sum * sqrt(K / LANES) * m            (relative L2)

u_store: unit round-off of the stored dtype, the last rounding. u_sum: unit round-off of the accumulator, float32 for
the half types. K: length of the longest sum behind a value; its rounding errors are independent, so they grow as a
square root (Higham and Mary 2019), and no kernel in use sums in fewer than LANES independent lanes. m: for the own code
of a composite, the magnitude of its parts' results over that of its own where it exceeds one: where they cancel, their
roundings stay; for attention, the magnitude of the values over that of their mean. A layer's own cancellation shows in
the yardstick. In a free run the floors of all sums before a record join its own, as independent errors do.

    bound = max(RATIO * yardstick, floor)

The maximum error has a bound of the same form: the reference's own maximum error, and floor times the largest entry.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from osp_shared.errors import OspError
from osp_shared.traces.metrics import Distance

# How much larger than the reference's own error that of another correct kernel may be. Measured on the quick suite with
# five salts (42 290 records): where this factor decides, at most 3.0 for a layer's own error and 3.8 in a free run
# in float32, 1.4 in the half types. See parity_tests/ratchet.json for the standing figures.
RATIO = 4.0
LANES = 16

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ACCUMULATOR = {"float64": "float64", "float32": "float32", "float16": "float32", "bfloat16": "float32"}


@dataclass(frozen=True)
class Bound:
    """What relative L2 and maximum error may be, and where that comes from ("yardstick" or "floor")."""

    rel_l2: float
    max_abs: float
    source: str

    def fraction(self, error: Distance) -> float:
        """Larger of the two errors over their bounds; infinite when values are NaN or infinite in one trace alone."""
        if error.nonfinite:
            return math.inf
        return max(_ratio(error.rel_l2, self.rel_l2), _ratio(error.max_abs, self.max_abs))


def _ratio(error: float, bound: float) -> float:
    if error == 0.0:
        return 0.0
    return error / bound if bound > 0.0 else math.inf


def unit_roundoff(dtype: str) -> float:
    if dtype not in UNIT_ROUNDOFF:
        raise OspError(f"no error bound for dtype {dtype!r}; one of {', '.join(UNIT_ROUNDOFF)}")
    return UNIT_ROUNDOFF[dtype]


def floor(dtype: str, reduction: int = 1, magnitude: float = 1.0) -> float:
    """Relative L2 error that correct arithmetic may show on its own."""
    stored = unit_roundoff(dtype)
    accumulated = unit_roundoff(ACCUMULATOR[dtype]) * math.sqrt(max(1.0, reduction / LANES))
    return stored + accumulated * max(1.0, magnitude)


def bound(dtype: str, truth_scale: float, truth_max: float, floor_rel: float, yardstick: Distance | None) -> Bound:
    """Bound of one tensor. `truth_scale`: its root mean square; `truth_max`: its largest magnitude."""
    measured = yardstick.rel_l2 if yardstick is not None else 0.0
    measured_max = yardstick.max_abs if yardstick is not None else 0.0
    source = "yardstick" if RATIO * measured > floor_rel else "floor"
    # A relative error of a zero tensor is absolute: then the smallest normal float32 is the only scale there is.
    rel = max(RATIO * measured, floor_rel if truth_scale > 0 else 2.0**-126)
    return Bound(rel, max(RATIO * measured_max, floor_rel * truth_max, 2.0**-126), source)
