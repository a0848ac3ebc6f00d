"""The trace: what one run of a model computed, module by module, in a folder that needs no framework to read.

    <trace>/manifest.json         header and one entry a record, in execution order
    <trace>/tensors.safetensors   arrays named by their record's number

manifest.json:

    format    "osp-trace"
    version   1; a reader refuses any other
    header    model        wfvae-encode | wfvae-decode | dit | inpaint | t5 | dit-sampler
              mode         free (the model as it is) | forced (every module fed with the reference's values)
              passes       forward | backward (forward and backward)
              config       the model's config.json keys
              weights      fingerprint of the float32 weights: names, shapes, values
              inputs       fingerprint of the model's inputs
              backend      torch | mindspore        device   cpu | ascend | ...
              dtype        float64 | float32 | float16 | bfloat16: the arithmetic of the run
              versions     of python, numpy and the framework
              salt         of the deterministic fill, "" when weights come from a checkpoint
              reference    forced traces: fingerprint of the values that were fed
    tensors   {"bytes", "sha256"} of the data file: a truncated copy is told from a whole one
    records   a list; see Record

Large tensors are kept as statistics and as values at positions drawn from the record's key and shape, so that two
machines that never meet keep the same positions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from osp_shared.errors import OspError
from osp_shared.fill import rng

FORMAT, VERSION = "osp-trace", 1
MANIFEST, TENSORS = "manifest.json", "tensors.safetensors"
FULL_LIMIT = 1 << 20  # elements up to which a tensor is kept whole
SAMPLES = 4096  # values kept of a larger one: relative L2 is then known to about 1 %

DTYPES = {
    "float64": ("F64", np.dtype(np.float64)),
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "int64": ("I64", np.dtype(np.int64)),
    "int32": ("I32", np.dtype(np.int32)),
    "bool": ("BOOL", np.dtype(np.bool_)),
}
KINDS = (
    "input",  # of a module; slot = position of the argument
    "output",  # of a module; slot = position in the returned tuple
    "param",  # a parameter; slot = its name inside the module
    "param_grad",
    "x_t",  # sampler state after the step
    "model_output",  # after guidance
    "x0",  # the step's estimate of the clean latents
)


@dataclass(frozen=True)
class Header:
    model: str
    config: Mapping[str, object]
    weights: str
    inputs: str
    backend: str
    dtype: str
    mode: str = "free"
    passes: str = "forward"
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=dict)
    salt: str = ""
    reference: str = ""


@dataclass(frozen=True)
class Record:
    """One tensor of one call of one module.

    path: module path ("" is the model itself), as in checkpoint keys. call: 0 for its first call in the run.
    step: sampler step, -1 outside trajectories. slot: position or parameter name inside the kind.
    parent: path of the module whose code made the call. after: the part of the parent that ran before; tells which
    stretch of the parent's own code made an input. reduction: length of the longest sum behind a value; 1 when unknown.
    """

    path: str
    kind: str
    slot: str
    call: int
    step: int
    dtype: str
    shape: tuple[int, ...]
    order: int
    tensor: str
    sampled: bool
    stats: Mapping[str, float]
    reduction: int = 1
    type: str = ""
    parent: str = ""
    after: str = ""

    @property
    def key(self) -> tuple[int, str, int, str, str]:
        return (self.step, self.path, self.call, self.kind, self.slot)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def title(self) -> str:
        return title(self.path, self.kind, self.slot, self.call, self.step)


def title(path: str, kind: str, slot: str, call: int = 0, step: int = -1) -> str:
    """How a record is named to people: `step 3: transformer_blocks.0.attn1 output`."""
    text = (path or "(model)") + (f" call {call + 1}" if call else "")
    text += f" {kind}" + (f" {slot}" if slot != "0" else "")
    return f"step {step}: {text}" if step >= 0 else text


def fingerprint(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
    """Hash of names, shapes and float32 values, in any order: a float64 copy of float32 weights has the same."""
    total = hashlib.sha256()
    for name, value in sorted(tensors, key=lambda item: item[0]):
        value = np.asarray(value)
        total.update(f"{name}:{'x'.join(map(str, value.shape))};".encode())
        kept = value.astype(np.float32) if value.dtype.kind in "fV" else value.astype(np.int64)
        total.update(np.ascontiguousarray(kept).data)
    return total.hexdigest()[:32]


def sample_positions(path: str, kind: str, slot: str, shape: tuple[int, ...]) -> np.ndarray:
    """Flat positions kept of a large tensor: a function of what it is, so equal on every machine."""
    size = int(np.prod(shape, dtype=np.int64))
    generator = rng(f"trace-sample:{path}:{kind}:{slot}:{'x'.join(map(str, shape))}")
    return np.sort(generator.integers(0, size, SAMPLES))


def statistics(value: np.ndarray) -> dict[str, float]:
    """Mean, rms, extremes and the count of NaN and infinite entries; the former over finite values alone."""
    wide = np.asarray(value, dtype=np.float64).ravel()
    finite = np.isfinite(wide)
    nan, inf = int(np.isnan(wide).sum()), int(np.isinf(wide).sum())
    good = wide if finite.all() else wide[finite]
    if not good.size:
        return {"mean": 0.0, "rms": 0.0, "min": 0.0, "max": 0.0, "nan": nan, "inf": inf}
    return {
        "mean": float(good.mean()),
        "rms": float(np.sqrt(np.mean(good * good))),
        "min": float(good.min()),
        "max": float(good.max()),
        "nan": nan,
        "inf": inf,
    }


class Trace:
    """Records in execution order and their values, in memory or behind a memory-mapped file."""

    def __init__(self, header: Header, records: list[Record], values: Mapping[str, np.ndarray], source: str = "memory"):
        self.header, self.records, self.source = header, records, source
        self._values = values
        self.by_key = {record.key: record for record in records}

    def value(self, record: Record) -> np.ndarray:
        """Values as stored: the record's shape when whole, the flat samples otherwise."""
        return self._values[record.tensor]

    def get(self, path: str, kind: str = "output", slot: str = "0", call: int = 0, step: int = -1) -> np.ndarray | None:
        record = self.by_key.get((step, path, call, kind, slot))
        return None if record is None else self.value(record)

    def fingerprint(self) -> str:
        """Of every record's values: what a forced trace names as its reference."""
        return fingerprint((r.tensor, np.asarray(self.value(r), dtype=np.float32)) for r in self.records)

    def write(self, folder: str | os.PathLike) -> Path:
        return write_trace(folder, self)


class Recorder:
    """Collects records while a model runs. `add` copies, so later in-place changes do not reach the trace."""

    def __init__(self, header: Header, full_limit: int = FULL_LIMIT):
        self.header, self.full_limit = header, full_limit
        self.records: list[Record] = []
        self._values: dict[str, np.ndarray] = {}

    def add(
        self,
        path: str,
        kind: str,
        value: np.ndarray,
        *,
        slot: str = "0",
        call: int = 0,
        step: int = -1,
        reduction: int = 1,
        type: str = "",
        parent: str = "",
        after: str = "",
    ) -> Record:
        if kind not in KINDS:
            raise OspError(f"trace record of unknown kind {kind!r}; one of {', '.join(KINDS)}")
        value = np.asarray(value)
        dtype = next((name for name, (_, np_dtype) in DTYPES.items() if np_dtype == value.dtype), None)
        if dtype is None:
            raise OspError(f"trace record {title(path, kind, slot)}: dtype {value.dtype} has no place in a trace")
        order = len(self.records)
        sampled = value.size > self.full_limit
        stored = value.ravel()[sample_positions(path, kind, slot, value.shape)] if sampled else value
        record = Record(
            path, kind, slot, call, step, dtype, tuple(value.shape), order, f"{order:06d}", sampled,
            statistics(value), reduction, type, parent, after,
        )  # fmt: skip
        self.records.append(record)
        self._values[record.tensor] = np.array(stored, copy=True, order="C")
        return record

    def trace(self, **changes: object) -> Trace:
        """The finished trace; `changes` replace header fields known only after the run."""
        return Trace(replace(self.header, **changes), self.records, self._values)


# ------------------------------------------------------------------------------------------------- reading and writing


def _data_header(records: list[Record], values: Mapping[str, np.ndarray]) -> bytes:
    entries, position = {}, 0
    for record in records:
        value = values[record.tensor]
        entries[record.tensor] = {
            "dtype": DTYPES[record.dtype][0],
            "shape": list(value.shape),
            "data_offsets": [position, position + value.nbytes],
        }
        position += value.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def write_trace(folder: str | os.PathLike, trace: Trace) -> Path:
    """Write a trace under a temporary name beside `folder`, then rename: no half-written trace is ever seen.

    Replaces an older trace of that name; refuses a folder that holds something else.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).exists())):
        raise OspError(f"{folder}: exists and is not a trace; choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        values = {record.tensor: trace.value(record) for record in trace.records}
        head = _data_header(trace.records, values)
        digest = hashlib.sha256()
        with open(work / TENSORS, "wb") as file:
            blocks = [len(head).to_bytes(8, "little"), head]
            for block in (*blocks, *(np.ascontiguousarray(values[r.tensor]).tobytes() for r in trace.records)):
                digest.update(block)
                file.write(block)
            size = file.tell()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "header": asdict(trace.header),
            "tensors": {"bytes": size, "sha256": digest.hexdigest()},
            "records": [asdict(record) for record in trace.records],
        }
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1, default=_plain) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(work, folder)
    finally:
        if work.exists():
            shutil.rmtree(work)
    return folder


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def _manifest(folder: Path) -> dict:
    if not (folder / MANIFEST).is_file():
        raise OspError(f"{folder}: no {MANIFEST}; a trace is a folder written by `osp trace capture`")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OspError(f"{folder / MANIFEST}: not valid JSON ({error}); capture the trace again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise OspError(f"{folder / MANIFEST}: format is not {FORMAT!r}; this is not a trace")
    if manifest.get("version") != VERSION:
        raise OspError(f"{folder}: trace version {manifest.get('version')!r}, this program reads version {VERSION}")
    return manifest


def read_trace(folder: str | os.PathLike, verify: bool = True) -> Trace:
    """Open a trace; values stay in the file until asked for.

    Raises OspError when the folder is no trace, has another version, or is truncated or altered (`verify` hashes the
    data file; sizes are checked either way).
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    data = folder / TENSORS
    try:
        expected = manifest["tensors"]
        header = Header(**manifest["header"])
        records = [Record(**{**r, "shape": tuple(r["shape"])}) for r in manifest["records"]]
        size, digest = int(expected["bytes"]), str(expected["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise OspError(f"{folder / MANIFEST}: malformed ({error}); capture the trace again") from None
    found = data.stat().st_size if data.is_file() else -1
    if found != size:
        what = "missing" if found < 0 else f"{found} bytes"
        raise OspError(f"{data}: {what}, the manifest says {size} bytes; the trace is truncated, copy it again")
    if verify and _sha256(data) != digest:
        raise OspError(f"{data}: contents differ from the manifest's sha256; the trace is damaged, copy it again")
    return Trace(header, records, _map_values(data, records), source=str(folder))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _map_values(path: Path, records: list[Record]) -> dict[str, np.ndarray]:
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        entries = json.loads(raw[8:start].tobytes())
        values = {}
        for record in records:
            entry = entries[record.tensor]
            code, dtype = DTYPES[record.dtype]
            first, last = (start + int(offset) for offset in entry["data_offsets"])
            if entry["dtype"] != code or (not record.sampled and tuple(entry["shape"]) != record.shape):
                raise OspError(f"{path}: tensor {record.tensor} is not what the manifest says ({record.title})")
            values[record.tensor] = raw[first:last].view(dtype).reshape(entry["shape"])
    except OspError:
        raise
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise OspError(f"{path}: malformed safetensors header ({error}); capture the trace again") from None
    return values
