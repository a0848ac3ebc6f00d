"""What a checkpoint is: kind, topology from its own names, sizes, types, fingerprint, and what would load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from osp_shared.checkpoints import kinds
from osp_shared.checkpoints.checkpoint import Checkpoint
from osp_shared.checkpoints.staging import gib
from osp_shared.errors import OspError


@dataclass(frozen=True)
class Inspection:
    """`problem`: why the weights do not load, or None. `topology`: the config's fields that shape the model."""

    path: str
    format: str
    kind: str | None
    title: str
    tensors: int
    parameters: int | None
    dtypes: dict[str, int]
    nbytes: int
    topology: dict[str, Any]
    fingerprint: str | None
    recorded: bool
    loader: str
    problem: str | None
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The same as text, one fact a line."""
        types = ", ".join(f"{count} x {code}" for code, count in self.dtypes.items())
        rows = [("path", self.path), ("format", self.format), ("model", self.title)]
        rows += [("tensors", f"{self.tensors} ({types})"), ("size", f"{gib(self.nbytes)} ({self.nbytes:,} bytes)")]
        if self.parameters is not None:
            rows.append(("parameters", f"{self.parameters:,}"))
        rows += [("topology", ", ".join(f"{k}={v}" for k, v in self.topology.items()))] if self.topology else []
        if self.fingerprint:
            rows.append(("fingerprint", f"{self.fingerprint} ({'recorded' if self.recorded else 'computed'})"))
        rows += [("note", note) for note in self.notes]
        rows.append(("problem", self.problem) if self.problem else ("loads with", self.loader))
        return [f"{label:<12} {value}" for label, value in rows]


def inspect(
    checkpoint: Checkpoint, hash_content: bool = True, progress: Callable[[int], None] = lambda n: None
) -> Inspection:
    """Look at an open checkpoint. Without recorded fingerprints its whole content is read, if `hash_content`."""
    kind, spec, problem = kinds.BY_NAME.get(checkpoint.kind), None, None
    try:
        spec = checkpoint.spec()
    except OspError as e:
        problem = str(e).removeprefix(f"{checkpoint.path}: ")
    recorded, print_ = all(n in checkpoint.digests for n in checkpoint.extents), None
    if recorded or hash_content:
        for name in checkpoint.extents if not recorded else ():
            checkpoint.digests[name] = checkpoint.tensor_fingerprint(name)
            progress(checkpoint.extents[name].nbytes)
        print_ = checkpoint.fingerprint()
    return Inspection(
        path=str(checkpoint.path),
        format=checkpoint.format,
        kind=checkpoint.kind,
        title=kind.title if kind else "unknown",
        tensors=len(checkpoint.extents),
        parameters=spec.parameter_count if spec is not None else None,
        dtypes=dict(Counter(checkpoint.dtypes.values()).most_common()),
        nbytes=checkpoint.nbytes,
        topology={f.name: getattr(spec, f.name) for f in fields(spec)} if spec is not None else {},
        fingerprint=print_,
        recorded=recorded,
        loader=kind.loader if kind else "nothing here",
        problem=problem,
        notes=tuple(checkpoint.notes),
    )
