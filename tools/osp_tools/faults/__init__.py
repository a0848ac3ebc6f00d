"""The catalogue of porting faults: each a slip of one line, made at run time in the MindSpore side alone.

A fault names a function, a piece of its source and what takes its place. The function's code is exchanged in place, so
every reference to it sees the fault, and put back afterwards. A piece that is no longer in the source is an error: the
catalogue follows the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType

from osp_shared.errors import OspError


@dataclass(frozen=True)
class Edit:
    """`old` becomes `new` in the source of `target`, a "module:function" or "module:Class.method"."""

    target: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """One slip.

    runs: names of the cases that are judged with it. where: regular expression that the first blamed path must match.
    proof: why no run can show it, for a fault that is mathematically invisible.
    """

    name: str
    what: str
    runs: tuple[str, ...]
    where: str
    edits: tuple[Edit, ...]
    proof: str = ""

    @contextmanager
    def patch(self) -> Iterator[None]:
        with ExitStack() as stack:
            for target in dict.fromkeys(edit.target for edit in self.edits):
                stack.enter_context(applied(target, [e for e in self.edits if e.target == target]))
            yield


def fault(name: str, what: str, runs: str, where: str, *edits: tuple[str, str, str], proof: str = "") -> Fault:
    return Fault(name, what, tuple(runs.split()), where, tuple(Edit(*edit) for edit in edits), proof)


def locate(target: str) -> FunctionType:
    """The plain function behind "module:Class.method": decorators, properties and caches are looked through."""
    module_name, _, path = target.partition(":")
    owner = importlib.import_module(module_name)
    for part in path.split("."):
        owner = inspect.getattr_static(owner, part)
    while not isinstance(owner, FunctionType) or hasattr(owner, "__wrapped__"):
        if isinstance(owner, property):
            owner = owner.fget
        elif isinstance(owner, (staticmethod, classmethod)):
            owner = owner.__func__
        elif hasattr(owner, "__wrapped__"):
            owner = owner.__wrapped__
        else:
            raise OspError(f"fault target {target}: not a function")
    return owner


@contextmanager
def applied(target: str, edits: list[Edit]) -> Iterator[None]:
    """The edits of one function in force inside the block. OspError when a text is not in its source."""
    function = locate(target)
    source = textwrap.dedent(inspect.getsource(function))
    for edit in edits:
        if edit.old not in source:
            raise OspError(f"fault target {target}: {edit.old!r} is not in its source any more")
        source = source.replace(edit.old, edit.new)
    changed = _compile(function, source)
    original, defaults = function.__code__, function.__defaults__
    caches = _caches()
    try:
        function.__code__, function.__defaults__ = changed
        for cached in caches:
            cached.cache_clear()
        yield
    finally:
        function.__code__, function.__defaults__ = original, defaults
        for cached in caches:
            cached.cache_clear()


def _compile(function: FunctionType, source: str) -> tuple[CodeType, tuple | None]:
    """Code and defaults of the edited source, with the closure variables of the original (`super()` needs one)."""
    tree = ast.parse(source).body[0]
    tree.decorator_list = []
    free = function.__code__.co_freevars
    outer = ast.parse("def outer():\n" + "".join(f"    {name} = None\n" for name in free) + "    pass").body[0]
    outer.body.append(tree)
    outer.body.append(ast.Return(ast.Name(tree.name, ast.Load())))
    module = ast.fix_missing_locations(ast.Module([outer], []))
    namespace = dict(function.__globals__)
    exec(compile(module, inspect.getsourcefile(function) or "<fault>", "exec"), namespace)  # noqa: S102
    made = namespace["outer"]()
    if made.__code__.co_freevars != free:
        raise OspError(f"fault in {function.__qualname__}: the edit changes its closure {free}")
    return made.__code__, made.__defaults__


def _caches() -> list:
    """Every cache of the project: what was made with or without the fault must not outlive it."""
    modules = [m for name, m in sys.modules.items() if name.startswith(("osp_shared.", "osp_mindspore."))]
    return [value for m in modules for value in list(vars(m).values()) if hasattr(value, "cache_clear")]


def catalogue() -> list[Fault]:
    """Every fault, grouped by model."""
    names = ("wfvae", "dit", "t5", "sampler")
    return [item for name in names for item in importlib.import_module(f"osp_tools.faults.{name}").FAULTS]


def find(name: str) -> Fault:
    for item in catalogue():
        if item.name == name:
            return item
    raise OspError(f"no fault {name!r} in the catalogue; see `osp parity --mutate list`")
