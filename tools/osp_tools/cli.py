"""The `osp` command. `osp --help` is the table of contents; each command's module is imported when it is asked for.

A command's module has `add_parser(subparsers)`, which adds its parser and sets `run=` to a function of the parsed
arguments that returns an exit status, or None for success.
Exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, NoReturn

from osp_shared.errors import OspError


class Command(NamedTuple):
    name: str
    help: str
    module: str


COMMANDS = (
    Command("sample", "text to video or image, from a prompt or a file of prompts", "osp_tools.sample"),
    Command("rec-video", "a video through the autoencoder and back", "osp_tools.rec_video"),
    Command("rec-video-folder", "every video of a folder or list through the autoencoder", "osp_tools.rec_folder"),
    Command("rec-image", "a picture through the autoencoder and back", "osp_tools.rec_image"),
    Command("convert", "weights from any format to torch or MindSpore, checked and verified", "osp_tools.convert"),
    Command("merge", "the shards of a model into one safetensors file", "osp_tools.merge"),
    Command("inspect", "what a checkpoint holds: model, topology, sizes, fingerprint", "osp_tools.inspect"),
    Command("parity", "prove the MindSpore models against the reference, layer by layer", "osp_tools.parity"),
    Command("trace", "capture what every layer computes; compare two captures anywhere", "osp_tools.trace"),
    Command("demo", "both jobs on both backends with tiny weights, and a table of differences", "osp_tools.demo"),
    Command("bench", "speed and memory of both backends beside a plain matrix product", "osp_tools.bench"),
)


class Parser(argparse.ArgumentParser):
    """Bad flags are one-line errors like any other bad input; abbreviations are not guessed."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": Formatter, **kwargs})
        self.left_out: dict[str, str] = {}

    def error(self, message: str) -> NoReturn:
        raise OspError(message)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but nothing is left unknown; a flag of the original without meaning here is told why."""
        for flag in (a.split("=")[0] for a in args or ()):
            if flag in self.left_out:
                raise OspError(f"{flag}: {self.left_out[flag]}")
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [o for action in self._actions for o in action.option_strings]
            close = get_close_matches(unknown[0].split("=")[0], flags, 1)
            hint = f"; did you mean {close[0]}?" if close else f" (see {self.prog} --help)"
            raise OspError(f"unknown argument {unknown[0]}{hint}")
        return parsed, unknown


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind every help text, except where there is none to tell."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action):
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


def contents() -> str:
    """What `osp --help` prints."""
    width = max(len(c.name) for c in COMMANDS) + 2
    lines = [f"  {c.name:{width}}{c.help}" for c in COMMANDS]
    return "\n".join(
        [
            "usage: osp COMMAND [options]",
            "",
            "Open-Sora Plan v1.3 on MindSpore, and its PyTorch reference.",
            "",
            *lines,
            "",
        ]
        + ["  osp COMMAND --help    the options of a command", "  osp --version"]
    )


def build_parser(command: Command) -> Parser:
    """The root parser with this one command; imports its module."""
    parser = Parser(prog="osp")
    importlib.import_module(command.module).add_parser(parser.add_subparsers(dest="command"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; raises SystemExit only for --help."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(contents())
        return 0
    if argv[0] == "--version":
        print(f"osp {own_version()}")
        return 0
    try:
        args = build_parser(find(argv[0])).parse_args(argv)
        args.argv = argv
        return args.run(args) or 0
    except OspError as error:
        return fail(str(error))
    except BrokenPipeError:  # `osp ... | head`
        sys.stderr.close()
        return 0
    except MemoryError as error:
        return fail(f"out of memory ({error or 'array too large'}); --enable_tiling or smaller sizes need less")
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("osp: interrupted", file=sys.stderr)
        return 130


def find(name: str) -> Command:
    for command in COMMANDS:
        if command.name == name:
            return command
    names = [c.name for c in COMMANDS]
    close = get_close_matches(name, names, 1)
    raise OspError(
        f"unknown command {name}; " + (f"did you mean {close[0]}?" if close else f"one of {', '.join(names)}")
    )


def fail(message: str) -> int:
    print("osp: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def own_version() -> str:
    try:
        return version("open-sora-parity")
    except PackageNotFoundError:
        return "unknown (not installed)"


if __name__ == "__main__":
    sys.exit(main())
