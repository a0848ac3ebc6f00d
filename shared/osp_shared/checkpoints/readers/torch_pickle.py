"""torch.save files, both forms, without torch: tensors become byte ranges, everything else plain containers.

Zip form (torch 1.6 and later): `<name>/data.pkl` and one member `<name>/data/<key>` a storage.
Legacy form (before 1.6; the published mT5, VGG-16 and LPIPS files): magic number, protocol and system information, the
object, the list of storage keys (five pickles), then each storage as an element count and its bytes.
Source: `torch/serialization.py` and `torch/_utils.py`.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp_shared.checkpoints import dtypes
from osp_shared.checkpoints.extent import Extent, Segment, checked_shape, shown
from osp_shared.checkpoints.readers import zip_index
from osp_shared.checkpoints.readers.pickle_machine import PickleMachine, Source, Symbol
from osp_shared.errors import OspError

MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE = 64 << 20
_MAX_REPEATED = 16 << 20  # bytes that a tensor may have beyond its storage (expanded tensors repeat elements)


@dataclass(frozen=True)
class Storage:
    """`numel` elements (bytes when dtype is None) from `start` in the storage `key`."""

    key: str
    dtype: str | None
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * dtypes.ITEMSIZE[self.dtype or "U8"]


@dataclass(frozen=True)
class TensorRef:
    """A view of a storage: offset and stride in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def parse(path: Path) -> tuple[Any, str]:
    """The pickled object with an `Extent` in the place of every tensor, and the name of the format."""
    try:
        with path.open("rb") as f:
            zipped = f.read(4) == b"PK\x03\x04"
        return (_zip(path), "torch zip") if zipped else (_legacy(path), "torch legacy")
    except OSError as e:
        raise OspError(f"{path}: cannot be read ({e.strerror})") from None


def _zip(path: Path) -> Any:
    found = zip_index.members(path)
    pickles = [name for name in found if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise OspError(f"{path}: an archive without exactly one data.pkl was not written by torch.save")
    prefix, member = pickles[0][: -len("data.pkl")], found[pickles[0]]
    with path.open("rb") as f:
        if (order := found.get(prefix + "byteorder")) is not None:
            f.seek(order.offset)
            if f.read(min(order.nbytes, 16)) != b"little":
                raise OspError(f"{path}: saved on a big-endian machine; re-save it on a little-endian one")
        if member.nbytes > _MAX_PICKLE:
            raise OspError(f"{path}: its data.pkl has {member.nbytes} bytes; no model's has that many")
        f.seek(member.offset)
        text = f.read(member.nbytes)
    segments = {name[len(prefix) + 5 :]: s for name, s in found.items() if name.startswith(prefix + "data/")}
    root = _run(Source(io.BytesIO(text), str(path)))
    return _Placer(path, segments).place(root)


def _legacy(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as f:
        source = Source(f, str(path))
        magic = _run(source) if f.peek(1)[:1] == b"\x80" else None
        if magic != MAGIC:
            raise OspError(f"{path}: a pickle that torch.save did not write; re-save it with torch.save")
        if _run(source) != 1001:
            raise OspError(f"{path}: unknown version of torch's legacy format")
        system = _run(source)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise OspError(f"{path}: saved on a big-endian machine; re-save it on a little-endian one")
        storages: dict[str, Storage] = {}
        root = _run(source, storages)
        keys = _run(source)
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or len(set(keys)) != len(keys):
            raise OspError(f"{path}: damaged list of storages")
        segments, at = {}, source.position
        for key in keys:
            if key not in storages:
                raise OspError(f"{path}: storage {shown(key, 40)} belongs to no tensor")
            f.seek(at)
            count = int.from_bytes(f.read(8), "little", signed=True)
            nbytes = storages[key].nbytes
            if count != storages[key].numel or at + 8 + nbytes > size:
                raise OspError(f"{path}: storage {shown(key, 40)} is damaged or cut off at byte {at} of {size}")
            segments[key] = Segment(path, at + 8, nbytes)
            at += 8 + nbytes
    return _Placer(path, segments).place(root)


def _run(source: Source, storages: dict[str, Storage] | None = None) -> Any:
    """Run one pickle; `storages` collects what its persistent ids name."""
    known: dict[str, Storage] = {} if storages is None else storages

    def persistent(pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise OspError(f"{source.where}: damaged pickle: a persistent id that names no storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        dtype = _storage_dtype(kind)
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 48:
            raise OspError(f"{source.where}: damaged pickle: storage {shown(key, 40)} of {shown(numel, 40)} elements")
        whole = Storage(key, dtype, numel)
        known[key] = whole
        view = pid[5] if len(pid) == 6 else None  # legacy: a part of another storage
        if view is None:
            return whole
        _, offset, count = view
        if type(offset) is not int or type(count) is not int or min(offset, count) < 0 or offset + count > numel:
            raise OspError(f"{source.where}: damaged pickle: a view outside storage {shown(key, 40)}")
        return Storage(key, dtype, count, offset)

    return PickleMachine(source, _symbol, persistent).run()


# -- the table of names ----------------------------------------------------------------------------------------------
def _symbol(name: str) -> Symbol | None:
    if name in _CALLS:
        return Symbol(name, _CALLS[name])
    package, _, last = name.rpartition(".")
    storage = package in ("torch", "torch.cuda", "torch.storage") and (
        last in dtypes.TORCH_STORAGE or last in ("UntypedStorage", "TypedStorage")
    )
    dtype = package == "torch" and last in dtypes.TORCH_DTYPE
    return Symbol(name) if storage or dtype or name in _CLASSES else None


def _storage_dtype(kind: Any) -> str | None:
    last = kind.name.rpartition(".")[2] if isinstance(kind, Symbol) else ""
    if last in ("UntypedStorage", "TypedStorage"):
        return None
    if last not in dtypes.TORCH_STORAGE:
        raise ValueError("a storage without a type")
    return dtypes.TORCH_STORAGE[last]


def _tensor(storage, offset, size, stride, *_) -> TensorRef:
    """_rebuild_tensor and _rebuild_tensor_v2; what follows the stride (gradient flag, hooks) is not data."""
    return _view(storage, storage.dtype if isinstance(storage, Storage) else None, offset, size, stride)


def _tensor_v3(storage, offset, size, stride, _gradient, _hooks, dtype, *_) -> TensorRef:
    code = dtypes.TORCH_DTYPE.get(dtype.name.rpartition(".")[2]) if isinstance(dtype, Symbol) else None
    return _view(storage, code, offset, size, stride)


def _size(items: Any) -> tuple[int, ...]:
    try:
        return checked_shape(items, "tensor")
    except OspError as e:
        raise ValueError(str(e)) from None


def _view(storage: Any, dtype: str | None, offset: Any, size: Any, stride: Any) -> TensorRef:
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor without a typed storage")
    shape = _size(size)
    ints = isinstance(stride, tuple) and all(type(n) is int and 0 <= n < 1 << 48 for n in stride)
    if not ints or len(stride) != len(shape) or type(offset) is not int or offset < 0:
        raise ValueError("impossible offset or stride")
    return TensorRef(storage, dtype, offset, shape, stride)


def _parameter(data, *_) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise ValueError("a parameter without a tensor")
    return data


def _from_type(function, kind, arguments, _state) -> TensorRef:
    """A tensor with Python attributes: the attributes are dropped."""
    if not isinstance(function, Symbol) or function.call not in (_tensor, _tensor_v3, _parameter):
        raise ValueError("a tensor that no known function rebuilds")
    if not isinstance(kind, Symbol) or kind.name not in _CLASSES:
        raise ValueError("a tensor of an unknown class")
    return function.call(*arguments)


def _ordered_dict(items=()) -> dict:
    if not isinstance(items, (list, tuple)):
        raise ValueError("an OrderedDict of something else than pairs")
    return {key: value for key, value in items if isinstance(key, (str, int))}


def _encoded(text, encoding="latin1") -> bytes:
    """How protocol 2 spells bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise ValueError("bytes in an unknown spelling")
    return text.encode(encoding)


_CALLS = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda items=(): _size(items),
    "torch.device": lambda *parts: ":".join(str(p) for p in parts if isinstance(p, (str, int))),
    "builtins.set": lambda items=(): list(items),
    "__builtin__.set": lambda items=(): list(items),
    "_codecs.encode": _encoded,
}
_CLASSES = frozenset({"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"})


# -- from views to byte ranges ---------------------------------------------------------------------------------------
class _Placer:
    """Replaces each TensorRef by an Extent, once for each object however often it is shared."""

    def __init__(self, path: Path, segments: dict[str, Segment]) -> None:
        self.path, self.segments = path, segments

    def place(self, root: Any) -> Any:
        """The same containers with extents in them; iterative, so that no nesting is too deep, and safe for cycles."""
        if isinstance(root, TensorRef):
            raise OspError(f"{self.path}: holds one bare tensor, not a dictionary of them")
        todo, seen = [root], set()
        while todo:
            box = todo.pop()
            if id(box) in seen or not isinstance(box, (dict, list)):
                continue
            seen.add(id(box))
            for key, value in box.items() if isinstance(box, dict) else enumerate(box):
                if isinstance(value, TensorRef):
                    box[key] = self.extent(value, shown(key))
                else:
                    todo.append(value)
        return root

    def extent(self, ref: TensorRef, name: str) -> Extent:
        where = f"{self.path}: tensor {shown(name)}"
        size, segment = dtypes.ITEMSIZE[ref.dtype], self.segments.get(ref.storage.key)
        if segment is None:
            raise OspError(f"{where}: its storage {shown(ref.storage.key, 40)} is missing from the file")
        if ref.storage.nbytes > segment.nbytes:
            raise OspError(f"{where}: its storage has {segment.nbytes} bytes instead of {ref.storage.nbytes}")
        numel = math.prod(ref.shape)
        if numel == 0:
            return Extent(ref.dtype, ref.shape, (Segment(segment.path, segment.offset, 0),))
        span = 1 + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
        first = ref.storage.start * dtypes.ITEMSIZE[ref.storage.dtype or "U8"] + ref.offset * size
        if (ref.offset + span) * size > ref.storage.nbytes:
            raise OspError(f"{where}: reaches beyond its storage of {ref.storage.nbytes} bytes")
        if numel * size > max(segment.nbytes, span * size + _MAX_REPEATED):
            raise OspError(f"{where}: {numel} elements out of a storage of {segment.nbytes} bytes")
        stride = None if _contiguous(ref.shape, ref.stride) else ref.stride
        return Extent(ref.dtype, ref.shape, (Segment(segment.path, segment.offset + first, span * size),), stride)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True
