"""Skiparse (Open-Sora Plan v1.3): attention inside n sub-sequences of the tokens instead of among all of them.

The N tokens are padded to N', a multiple of n^2. Token i goes to

    single-skip   sub-sequence i mod n,         position i // n
    group-skip    sub-sequence (i // n) mod n,  position (i // n^2) n + i mod n

Both are transpositions of the padded sequence seen as (outer, n, inner): inner is 1 for single-skip and n for
group-skip. Sub-sequences become the slowest part of the batch: row s B + b.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from osp_shared.errors import OspError
from osp_shared.geometry.tokens import PAD


@dataclass(frozen=True)
class Skiparse:
    """One block's rule; n = 1 is dense attention.

    Raises:
        OspError: n below 1.
    """

    n: int = 1
    group: bool = False

    def __post_init__(self):
        if self.n < 1:
            raise OspError(f"sparse_n is {self.n}, must be at least 1")

    def padding(self, count: int) -> int:
        """Pads behind `count` tokens."""
        return -count % (self.n * self.n)

    def factors(self, count: int) -> tuple[int, int, int]:
        """(outer, n, inner) of the padded sequence; a sub-sequence has outer * inner entries."""
        inner = self.n if self.group else 1
        return (count + self.padding(count)) // (self.n * inner), self.n, inner

    def positions(self, count: int) -> np.ndarray:
        """(n, N' / n) int64: the token at each place of each sub-sequence, -1 for a pad. Read-only, kept per shape."""
        return _positions(self, count)

    def key_bias(self, bias_BN: np.ndarray | None, batch: int, count: int) -> np.ndarray | None:
        """(n B, 1, 1, N' / n) float32, one row for each sub-sequence's keys; None when there is nothing to hide.

        bias_BN: bias of each token, None when every token is visible: then only pads are hidden, if there are any.
        """
        return _pad_bias(self, batch, count) if bias_BN is None else _arrange(self, bias_BN)


@lru_cache(maxsize=64)
def _positions(rule: Skiparse, count: int) -> np.ndarray:
    places = np.pad(np.arange(count), (0, rule.padding(count)), constant_values=-1)
    result = places.reshape(rule.factors(count)).transpose(1, 0, 2).reshape(rule.n, -1)
    result.flags.writeable = False
    return result


def _arrange(rule: Skiparse, bias_BN: np.ndarray) -> np.ndarray:
    B, count = bias_BN.shape
    padded = np.pad(bias_BN, ((0, 0), (0, rule.padding(count))), constant_values=PAD).astype(np.float32)
    parts = padded.reshape(B, *rule.factors(count)).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(parts).reshape(rule.n * B, 1, 1, -1)


@lru_cache(maxsize=64)
def _pad_bias(rule: Skiparse, batch: int, count: int) -> np.ndarray | None:
    if not rule.padding(count):
        return None
    result = _arrange(rule, np.zeros((batch, count), np.float32))
    result.flags.writeable = False
    return result
