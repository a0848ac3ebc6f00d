"""Which of the state dicts inside a training checkpoint is meant.

First match wins, as upstream's loader has it: `ema_state_dict` unless it is empty or NOT_USE_EMA_MODEL is set (to
anything), `state_dict.gen_model`, `state_dict`, the object itself. One difference: an EMA set without the frozen
encoder takes the missing tensors from the trained weights instead of leaving them at random.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from osp_shared.checkpoints.extent import Extent, shown
from osp_shared.errors import OspError

LOSS_KINDS = frozenset({"discriminator", "lpips"})  # these lie in the trainer's `dics_model` (sic)
_PLAIN = ("state_dict", "model", "module", "model_state_dict")


def select(root: Any, path: Path, kind: str | None) -> tuple[dict[str, Extent], list[str]]:
    """The tensors meant, by the names in that dict, and notes on the choice. OspError when there are none."""
    if not isinstance(root, dict):
        raise OspError(f"{path}: holds a {type(root).__name__}, not a dictionary of tensors")
    ema, trained, where = _tensors(root.get("ema_state_dict")), *_trained(root, kind)
    if kind in LOSS_KINDS or not ema:
        return _filled(trained, path, root), [f"weights from {where}"] if where else []
    if "NOT_USE_EMA_MODEL" in os.environ:
        return _filled(trained, path, root), [f"NOT_USE_EMA_MODEL is set: weights from {where or 'the file'}, not EMA"]
    averaged = {name.replace("module.", ""): extent for name, extent in ema.items()}
    rest = {name: e for name, e in trained.items() if name.replace("module.", "") not in averaged} if where else {}
    notes = ["EMA weights (ema_state_dict)"]
    if rest:
        notes.append(f"{len(rest)} tensors that the EMA set lacks are taken from {where}")
    return averaged | {name.replace("module.", ""): e for name, e in rest.items()}, notes


def _trained(root: dict, kind: str | None) -> tuple[dict[str, Extent], str]:
    """Weights that are not EMA, and the key they lie under ("" for the object itself)."""
    state = root.get("state_dict")
    if isinstance(state, dict):
        part = "dics_model" if kind in LOSS_KINDS else "gen_model"
        if isinstance(state.get(part), dict):
            return _tensors(state[part]), f"state_dict.{part}"
    own = _tensors(root)
    for key in _PLAIN:
        if (inner := _tensors(root.get(key))) and (key == "state_dict" or not own):
            return inner, key
    return own, ""


def _tensors(value: Any) -> dict[str, Extent]:
    if not isinstance(value, dict):
        return {}
    return {name: e for name, e in value.items() if isinstance(name, str) and isinstance(e, Extent)}


def _filled(tensors: dict[str, Extent], path: Path, root: dict) -> dict[str, Extent]:
    if not tensors:
        keys = ", ".join(shown(k, 40) for k in list(root)[:8]) or "nothing"
        raise OspError(f"{path}: no state dict with tensors in it; it holds {keys}")
    return tensors
