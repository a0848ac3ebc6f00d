"""A pickle machine that builds plain containers and what an explicit table allows, and nothing else.

Python's own unpickler runs whatever a file names, and allocates what a file claims. This one runs the stack language
itself: no import, no attribute access, no call outside the table, no allocation that the bytes in hand do not cover.
Source: the opcode descriptions in Python's `pickletools`.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import Any

from osp_shared.errors import OspError

_MARK = object()
_MAX_TEXT = 16 << 20  # one string or bytes object
_MAX_LINE = 4096  # one line of the text opcodes
_MAX_PICKLE = 64 << 20  # bytes; the state of a model with ten thousand tensors takes about 3 MiB
_MAX_STEPS = 2_000_000  # a tensor takes about 35; an opcode makes at most one object of some 200 bytes
_SCALARS = (str, int, float, bool, bytes, type(None))


class Symbol:
    """A name that the table allows. REDUCE calls it; `call` is None for names that are only mentioned."""

    __slots__ = ("name", "call")

    def __init__(self, name: str, call: Callable[..., Any] | None = None) -> None:
        self.name, self.call = name, call


class Source:
    """Bytes of a file or a buffer, read strictly: asking beyond the end is an error, not a short answer."""

    def __init__(self, file, where: str) -> None:
        self._file, self.where, self.position = file, where, 0

    def read(self, n: int) -> bytes:
        if n > _MAX_TEXT or self.position + n > _MAX_PICKLE:
            raise OspError(f"{self.where}: an object of {n} bytes at byte {self.position} of the pickle; it is damaged")
        data = self._file.read(n)
        if len(data) < n:
            raise OspError(f"{self.where}: the pickle ends early at byte {self.position + len(data)}")
        self.position += n
        return data

    def line(self) -> bytes:
        data = self._file.readline(_MAX_LINE)
        if not data.endswith(b"\n"):
            raise OspError(f"{self.where}: a line of the pickle does not end at byte {self.position + len(data)}")
        self.position += len(data)
        return data[:-1]


class PickleMachine:
    """Runs one pickle. `symbols(name)` gives the Symbol of an allowed "module.name" or None; `persistent(id)` resolves
    persistent ids. `run` returns the object; OspError names whatever else the pickle asks for."""

    def __init__(
        self, source: Source, symbols: Callable[[str], Symbol | None], persistent: Callable[[Any], Any]
    ) -> None:
        self.source, self.where = source, source.where
        self._symbols, self._persistent = symbols, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        read, steps = self.source.read, _STEPS
        try:
            for _ in range(_MAX_STEPS):
                code = read(1)
                if code == b".":
                    result = self.stack.pop()
                    if result is _MARK:
                        raise IndexError
                    return result
                step = steps.get(code)
                if step is None:
                    raise OspError(f"{self.where}: opcode {code!r} at byte {self.source.position - 1} is not read here")
                step(self)
            raise OspError(f"{self.where}: the pickle has more than {_MAX_STEPS} steps; no model has that many tensors")
        except OspError:
            raise
        except RecursionError:
            raise OspError(f"{self.where}: the pickle is nested too deeply") from None
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as e:
            raise OspError(
                f"{self.where}: damaged pickle at byte {self.source.position} ({type(e).__name__}: {str(e)[:80]})"
            ) from None

    # -- stack ---------------------------------------------------------------------------------------------------
    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value is due")
        return value

    def top(self, kind: type) -> Any:
        value = self.stack[-1]
        if type(value) is not kind:
            raise ValueError(f"expected a {kind.__name__} on the stack")
        return value

    def to_mark(self) -> list[Any]:
        """Everything above the last mark, which is removed."""
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def text(self, n: int, encoding: str = "utf-8") -> str:
        return self.source.read(n).decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")

    def number(self, form: str) -> int:
        return struct.unpack(form, self.source.read(struct.calcsize(form)))[0]

    # -- names ---------------------------------------------------------------------------------------------------
    def refuse(self, name: str) -> OspError:
        shown = name if name.isprintable() else ascii(name)
        return OspError(
            f"{self.where}: refused: the pickle asks for {shown[:120]}, and only tensors and plain containers are read"
        )

    def symbol(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a global whose name is not text")
        found = self._symbols(f"{module}.{name}")
        if found is None:
            raise self.refuse(f"{module}.{name}")
        self.stack.append(found)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Symbol) or not isinstance(arguments, tuple):
            raise ValueError("REDUCE of something that is not a function")
        if function.call is None:
            raise self.refuse(f"a call of {function.name}")
        self.stack.append(function.call(*arguments))

    def build(self) -> None:
        """Attributes of an object: only dictionaries have any here (torch's `_metadata`), and they are dropped."""
        state, target = self.pop(), self.stack[-1]
        if not isinstance(target, dict) or not isinstance(state, dict):
            name = target.name if isinstance(target, Symbol) else type(target).__name__
            raise self.refuse(f"attributes of {name}")

    def instance(self) -> None:
        """NEWOBJ, NEWOBJ_EX, OBJ and INST make objects of classes; none is allowed."""
        found = next((v for v in reversed(self.stack) if isinstance(v, Symbol)), None)
        raise self.refuse(f"an object of class {found.name}" if found else "an object of a class")

    def inst(self) -> None:
        module, name = self.source.line().decode("latin-1"), self.source.line().decode("latin-1")
        raise self.refuse(f"{module}.{name}")

    # -- containers ----------------------------------------------------------------------------------------------
    def set_items(self, target: dict, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[hashable(key)] = value

    def put(self, key: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark in the memo")
        self.memo[key] = self.stack[-1]


def hashable(key: Any) -> Any:
    """Keys are scalars or flat tuples of them: hashing nested tuples that share parts takes exponential time."""
    if isinstance(key, _SCALARS) or (type(key) is tuple and all(isinstance(k, _SCALARS) for k in key)):
        return key
    raise ValueError(f"a {type(key).__name__} as a key")


def _py2_string(machine: PickleMachine) -> str:
    text = machine.source.line().strip()
    if len(text) < 2 or text[0] not in b"'\"" or text[-1] != text[0]:
        raise ValueError("an unquoted string")
    return codecs.escape_decode(text[1:-1])[0].decode("latin-1")


def _int_line(machine: PickleMachine) -> int | bool:
    line = machine.source.line()
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else _integer(line)


def _integer(text: bytes) -> int:
    if len(text) > 40:
        raise ValueError("an integer of more than 40 digits")
    return int(text)


def _long(machine: PickleMachine, n: int) -> int:
    if not 0 <= n <= 255:
        raise ValueError("an integer of more than 255 bytes")
    return int.from_bytes(machine.source.read(n), "little", signed=True)


def _tuple(machine: PickleMachine, n: int) -> tuple:
    values = [machine.pop() for _ in range(n)]
    return tuple(reversed(values))


def _push(make: Callable[[PickleMachine], Any]) -> Callable[[PickleMachine], None]:
    return lambda m: m.stack.append(make(m))


_STEPS: dict[bytes, Callable[[PickleMachine], Any]] = {
    b"\x80": lambda m: m.source.read(1),  # PROTO
    b"\x95": lambda m: m.source.read(8),  # FRAME
    b"(": lambda m: m.stack.append(_MARK),
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.to_mark(),
    b"2": lambda m: m.stack.append(m.stack[-1]) if m.stack[-1] is not _MARK else m.pop(),  # DUP
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"I": _push(_int_line),
    b"J": _push(lambda m: m.number("<i")),
    b"K": _push(lambda m: m.number("<B")),
    b"M": _push(lambda m: m.number("<H")),
    b"L": _push(lambda m: _integer(m.source.line().rstrip(b"L"))),
    b"\x8a": _push(lambda m: _long(m, m.number("<B"))),
    b"\x8b": _push(lambda m: _long(m, m.number("<i"))),
    b"F": _push(lambda m: float(m.source.line())),
    b"G": _push(lambda m: m.number(">d")),
    b"S": _push(_py2_string),
    b"T": _push(lambda m: m.text(m.number("<I"), "latin-1")),
    b"U": _push(lambda m: m.text(m.number("<B"), "latin-1")),
    b"V": _push(lambda m: m.source.line().decode("raw-unicode-escape")),
    b"X": _push(lambda m: m.text(m.number("<I"))),
    b"\x8c": _push(lambda m: m.text(m.number("<B"))),
    b"\x8d": _push(lambda m: m.text(m.number("<Q"))),
    b"B": _push(lambda m: m.source.read(m.number("<I"))),
    b"C": _push(lambda m: m.source.read(m.number("<B"))),
    b"\x8e": _push(lambda m: m.source.read(m.number("<Q"))),
    b"\x96": _push(lambda m: m.source.read(m.number("<Q"))),  # BYTEARRAY8
    b"]": _push(lambda m: []),
    b"a": lambda m: (lambda v: m.top(list).append(v))(m.pop()),
    b"e": lambda m: (lambda v: m.top(list).extend(v))(m.to_mark()),
    b"l": _push(lambda m: m.to_mark()),
    b")": _push(lambda m: ()),
    b"t": _push(lambda m: tuple(m.to_mark())),
    b"\x85": _push(lambda m: _tuple(m, 1)),
    b"\x86": _push(lambda m: _tuple(m, 2)),
    b"\x87": _push(lambda m: _tuple(m, 3)),
    b"}": _push(lambda m: {}),
    b"d": lambda m: (lambda v: (m.stack.append({}), m.set_items(m.stack[-1], v)))(m.to_mark()),
    b"s": lambda m: (lambda v: m.set_items(m.top(dict), list(v)))(_tuple(m, 2)),
    b"u": lambda m: (lambda v: m.set_items(m.top(dict), v))(m.to_mark()),
    b"\x8f": _push(lambda m: set()),
    b"\x90": lambda m: (lambda v: m.top(set).update(map(hashable, v)))(m.to_mark()),
    b"\x91": _push(lambda m: frozenset(map(hashable, m.to_mark()))),
    b"g": _push(lambda m: m.memo[_integer(m.source.line())]),
    b"h": _push(lambda m: m.memo[m.number("<B")]),
    b"j": _push(lambda m: m.memo[m.number("<I")]),
    b"p": lambda m: m.put(_integer(m.source.line())),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"c": lambda m: m.symbol(m.source.line().decode("utf-8"), m.source.line().decode("utf-8")),
    b"\x93": lambda m: m.symbol(*_tuple(m, 2)),
    b"R": PickleMachine.reduce,
    b"b": PickleMachine.build,
    b"i": PickleMachine.inst,
    b"o": PickleMachine.instance,
    b"\x81": PickleMachine.instance,
    b"\x92": PickleMachine.instance,
    b"Q": lambda m: m.stack.append(m._persistent(m.pop())),  # BINPERSID
}
