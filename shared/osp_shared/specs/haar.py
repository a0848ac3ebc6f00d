"""Filters of WFVAE's Haar transforms: constants that its state dict holds under the names of their bands."""

from __future__ import annotations

import numpy as np

# In 3-D the factor is 0.3536, not 1 / (2 sqrt 2): inverse(forward(x)) = 1.00026 x, and the weights know it.
HAAR_3D_FACTOR = 0.3536
_PAIR = ((1.0, 1.0), (1.0, -1.0))  # low and high

# Band order is channel order. 2-D lists the height difference before the width difference, 3-D after it.
HAAR_3D_BANDS = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
HAAR_2D_BANDS = ("aa", "ad", "da", "dd")


def haar_3d() -> dict[str, np.ndarray]:
    """Band -> float32 filter (2, 2, 2) over (t, h, w), in channel order."""
    filters = [HAAR_3D_FACTOR * np.einsum("t,h,w->thw", t, h, w) for t in _PAIR for h in _PAIR for w in _PAIR]
    return {band: f.astype(np.float32) for band, f in zip(HAAR_3D_BANDS, filters, strict=True)}


def haar_2d() -> dict[str, np.ndarray]:
    """Band -> float32 filter (2, 2) over (h, w), in channel order."""
    filters = [0.5 * np.einsum("h,w->hw", h, w) for w in _PAIR for h in _PAIR]
    return {band: f.astype(np.float32) for band, f in zip(HAAR_2D_BANDS, filters, strict=True)}
