"""What every spec needs: reading a config.json strictly, and comparing tensor shapes with the expected ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from osp_shared.errors import OspError

NAMED = 5  # names spelled out in an error before it only counts


def from_config(cls, config: Mapping[str, Any]):
    """An instance of the frozen dataclass `cls` from a config mapping: lists become tuples, `_keys` are skipped.

    Raises:
        OspError: a key that `cls` does not have.
    """
    known = {f.name for f in dataclasses.fields(cls)}
    given = {k: v for k, v in config.items() if not k.startswith("_")}
    if unknown := sorted(set(given) - known):
        raise OspError(f"{cls.__name__}: unknown config keys {some(unknown)}; known: {', '.join(sorted(known))}")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def from_folder(cls, path: str | Path):
    """An instance from `<path>/config.json`.

    Raises:
        OspError: no such file, not JSON, not an object, or an unknown key.
    """
    return cls.from_config(read_object(Path(path) / "config.json"))


def read_object(file: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OspError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise OspError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise OspError(f"{file}: not JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise OspError(f"{file}: must hold a JSON object")
    return value


def to_config(spec) -> dict[str, Any]:
    """Every field that is not None, tuples as lists: what `from_config` reads back."""
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


def check_shapes(
    what: str,
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> None:
    """Compare a checkpoint's shapes with the expected ones.

    optional: expected names that may be absent; ignored: other names that may be present.

    Raises:
        OspError: names that are missing, unexpected or of another shape, the first few of each and their number.
    """
    missing = [n for n in expected if n not in shapes and n not in optional]
    unexpected = [n for n in shapes if n not in expected and n not in ignored]
    other = [
        f"{n} {tuple(shapes[n])} instead of {expected[n]}"
        for n in expected
        if n in shapes and tuple(shapes[n]) != tuple(expected[n])
    ]
    faults = [
        f"{len(names)} {kind}: {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    ]
    if faults:
        raise OspError(f"the weights do not fit the {what} config: " + "; ".join(faults))


def some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
