"""From a path to a checked spec and its tensors: the part of loading that knows no framework."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from osp_shared.checkpoints import Checkpoint, open_checkpoint
from osp_shared.errors import OspError

DTYPES = ("fp32", "fp16", "bf16")


class Weights:
    """A model's spec and tensors: topology from the tensors' own names, checked against config.json.

    `read` serves a backend's `build`: an array for each entry, None for a constant that the files leave out.
    """

    def __init__(self, path: str | Path, spec_class, config: dict | None = None) -> None:
        """Raises OspError: unreadable files, a topology that contradicts the config, missing or unexpected names."""
        self.checkpoint: Checkpoint = open_checkpoint(path)
        config = self.checkpoint.config if config is None else config
        try:
            self.spec = spec_class.derive(self.checkpoint.shapes, config)
            self.spec.check(self.checkpoint.shapes)
        except OspError as error:
            raise OspError(f"{path}: {error}") from None

    def read(self, name: str) -> np.ndarray | None:
        return self.checkpoint.read(name) if name in self.checkpoint.shapes else None


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise OspError(f"precision {dtype}: must be one of {', '.join(DTYPES)}")
    return dtype
