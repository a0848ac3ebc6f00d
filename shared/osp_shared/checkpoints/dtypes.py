"""The element types of checkpoint files: one code (safetensors' own) for each, and its name in every format."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from osp_shared.errors import OspError

# code: (numpy dtype, torch storage class or None, torch dtype attribute, MindSpore .ckpt name or None)
_TABLE = {
    "F64": (np.float64, "DoubleStorage", "float64", "Float64"),
    "F32": (np.float32, "FloatStorage", "float32", "Float32"),
    "F16": (np.float16, "HalfStorage", "float16", "Float16"),
    "BF16": (ml_dtypes.bfloat16, "BFloat16Storage", "bfloat16", "BFloat16"),
    "F8_E4M3": (ml_dtypes.float8_e4m3fn, None, "float8_e4m3fn", None),
    "F8_E5M2": (ml_dtypes.float8_e5m2, None, "float8_e5m2", None),
    "I64": (np.int64, "LongStorage", "int64", "Int64"),
    "I32": (np.int32, "IntStorage", "int32", "Int32"),
    "I16": (np.int16, "ShortStorage", "int16", "Int16"),
    "I8": (np.int8, "CharStorage", "int8", "Int8"),
    "U64": (np.uint64, None, "uint64", "UInt64"),
    "U32": (np.uint32, None, "uint32", "UInt32"),
    "U16": (np.uint16, None, "uint16", "UInt16"),
    "U8": (np.uint8, "ByteStorage", "uint8", "UInt8"),
    "BOOL": (np.bool_, "BoolStorage", "bool", "Bool"),
    "C64": (np.complex64, "ComplexFloatStorage", "complex64", None),
}
NUMPY: dict[str, np.dtype] = {code: np.dtype(row[0]) for code, row in _TABLE.items()}  # little-endian machines
ITEMSIZE: dict[str, int] = {code: dtype.itemsize for code, dtype in NUMPY.items()}
TORCH_STORAGE: dict[str, str] = {row[1]: code for code, row in _TABLE.items() if row[1]}
TORCH_DTYPE: dict[str, str] = {row[2]: code for code, row in _TABLE.items()}
MINDSPORE: dict[str, str] = {row[3]: code for code, row in _TABLE.items() if row[3]}
MINDSPORE_NAME: dict[str, str] = {code: name for name, code in MINDSPORE.items()}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_SPELLINGS = {"fp32": "F32", "fp16": "F16", "half": "F16", "bf16": "BF16", "fp64": "F64"}


def parse(name: str) -> str:
    """Code of a float type as people write it (`bf16`, `float32`, ...)."""
    code = _SPELLINGS.get(name.lower()) or TORCH_DTYPE.get(name.lower(), name)
    if code not in FLOATS:
        raise OspError(f"dtype {name!r}: choose fp32, fp16, bf16 or fp64")
    return code


def code_of(dtype) -> str:
    """Code of a numpy dtype; any library's own `bfloat16` type is recognised by its name."""
    dtype = np.dtype(dtype)
    if dtype.name == "bfloat16":
        return "BF16"
    for code, known in NUMPY.items():
        if known.newbyteorder("=") == dtype.newbyteorder("="):
            return code
    raise OspError(f"arrays of type {dtype} cannot be stored in a checkpoint: use one of {', '.join(TORCH_DTYPE)}")
