"""`osp inspect`: what a checkpoint holds, whether it is whole, and what would load it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from osp_shared.checkpoints import kinds, open_checkpoint
from osp_shared.checkpoints.inspection import inspect

HELP = "what a checkpoint holds: model, topology, sizes, fingerprint, and what loads it"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("inspect", help=HELP, description=HELP)
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="+", help="file, index .json or folder; several are one set in parts")
    parser.add_argument("--kind", choices=tuple(kinds.BY_NAME), help="which model of a training checkpoint")
    parser.add_argument("--quick", action="store_true", help="headers only: no fingerprint unless one is recorded")
    parser.add_argument("--verify", action="store_true", help="read everything and compare the recorded fingerprints")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its type and shape")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Exit status 1 when the weights would not load."""
    from tqdm import tqdm

    with open_checkpoint(args.path, args.kind) as checkpoint:
        bar = tqdm(
            total=checkpoint.nbytes, desc="reading", unit="B", unit_scale=True, unit_divisor=1024, leave=False,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        with bar:
            if args.verify:
                for name in checkpoint.digests:
                    for piece in checkpoint.chunks(name):
                        bar.update(piece.size)
            found = inspect(checkpoint, hash_content=not args.quick, progress=bar.update)
        if args.json:
            listed = {n: {"dtype": checkpoint.dtypes[n], "shape": s} for n, s in checkpoint.shapes.items()}
            print(json.dumps({**asdict(found), **({"names": listed} if args.tensors else {})}, indent=2))
        else:
            print("\n".join(found.lines()))
            if args.verify:
                print(f"{'verified':<12} {len(checkpoint.digests)} tensors read as they were written")
            for name, shape in checkpoint.shapes.items() if args.tensors else ():
                print(f"  {checkpoint.dtypes[name]:<5} {str(list(shape)):<24} {name}")
    return 1 if found.problem else 0
