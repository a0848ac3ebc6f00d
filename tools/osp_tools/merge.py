"""`osp merge`: the shards of a model into one safetensors file.

Nothing here needs it, since shards are read as they are; it is kept for other tools.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from osp_shared.checkpoints import Options, convert, open_checkpoint
from osp_shared.checkpoints.locate import locate
from osp_shared.errors import OspError
from osp_tools.convert import Bar, print_report, print_source

HELP = "the shards of a model into one safetensors file"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("merge", help=HELP, description=HELP)
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input_folder", "-i", required=True, type=Path, help="folder with the shards")
    parser.add_argument("--output_file", "-o", required=True, type=Path, help="the .safetensors file to write")
    parser.add_argument("--index_file", "-f", type=Path, help="index .json (default: the one in the folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")


def run(args: argparse.Namespace) -> int:
    if args.output_file.suffix != ".safetensors":
        raise OspError(f"{args.output_file}: the output file must end in .safetensors")
    place = locate(args.index_file or args.input_folder)
    if place.index is None:
        raise OspError(f"{args.input_folder}: no index .json, so there are no shards to merge")
    if place.folder.resolve() != args.input_folder.resolve():
        raise OspError(f"{args.index_file}: lies outside {args.input_folder}, where the shards would be")
    with open_checkpoint(args.index_file or args.input_folder) as source, Bar() as bar:
        print_source(source)
        one_file = Options(shard_bytes=1 << 62, overwrite=args.overwrite)
        report = convert(source, args.output_file, one_file, progress=bar.tell, unknown=True)
    print_report(report)
    return 0
