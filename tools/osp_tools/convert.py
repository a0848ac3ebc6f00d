"""`osp convert`: any checkpoint to a model folder, a safetensors file or a MindSpore .ckpt, streamed and verified."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from osp_shared.checkpoints import Checkpoint, Options, Report, convert, dtypes, kinds, open_checkpoint
from osp_shared.checkpoints.nested import LOSS_KINDS
from osp_shared.checkpoints.raw import read_config
from osp_shared.checkpoints.staging import gib
from osp_shared.errors import OspError

HELP = "weights from any format to torch or MindSpore, checked and verified"
EXAMPLES = """
what to convert:
  auto       told from the tensor names (default)
  wfvae, dit, inpaint, t5, lpips, discriminator, llama
             the same, but an error if the source holds another model
  torch-bin  any torch pickle; a model that is not known here keeps its names and is not checked
  release    a whole Open-Sora-Plan-v1.3.0 download folder
  i2v        an image-to-video model that starts from a text-to-video checkpoint

examples:
  osp convert wfvae --src vae/merged.ckpt --target vae/diffusion_pytorch_model.safetensors --config vae/config.json
  osp convert torch-bin --src mt5-xxl/pytorch_model.bin --target mt5-xxl/model.safetensors
  osp convert --src any93x640x640 --target dit-ms --to mindspore --dtype bf16
  osp convert release --src LanguageBind/Open-Sora-Plan-v1.3.0 --target osp-v1.3.0
"""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NO_LIMIT = 1 << 62


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("convert", help=HELP, description=HELP)
    add_arguments(parser)
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = ("auto", *kinds.BY_NAME, "torch-bin", "release", "i2v")
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", nargs="?", choices=what, default="auto", help="see below")
    parser.add_argument(
        "--src", "--source", "-s", nargs="+", required=True, metavar="PATH", help="file, index .json or folder"
    )
    parser.add_argument(
        "--target", "-t", required=True, type=Path, metavar="PATH", help="folder, or a .safetensors or .ckpt file"
    )
    parser.add_argument("--config", type=Path, metavar="JSON", help="config.json, when it is not beside the weights")
    parser.add_argument("--to", choices=("torch", "mindspore"), help="parameter names (torch; .ckpt: mindspore)")
    parser.add_argument("--dtype", metavar="TYPE", help="cast to fp32, bf16, fp16 or fp64 (default: as they are)")
    parser.add_argument("--shard_size", default="5GB", metavar="SIZE", help="most bytes a file; 0: one file")
    parser.add_argument("--overwrite", action="store_true", help="replace weights that are at the target")


def run(args: argparse.Namespace) -> int:
    if args.what == "release":
        return _release(args)
    wanted = None if args.what in ("auto", "torch-bin", "i2v") else args.what
    with open_checkpoint(args.src, wanted if wanted in LOSS_KINDS else None) as source:
        if wanted not in (None, source.kind):
            held = kinds.BY_NAME[source.kind].title if source.kind else "an unknown model"
            raise OspError(f"{args.src[0]}: holds {held}, not {kinds.BY_NAME[wanted].title}")
        if args.what == "i2v":
            from osp_shared.checkpoints.i2v import start_from_t2v

            start_from_t2v(source)
        print_source(source)
        unknown = args.what == "torch-bin"
        with Bar() as bar:
            report = convert(source, args.target, options(args), config(args.config), bar.tell, unknown)
    print_report(report)
    return 0


def _release(args: argparse.Namespace) -> int:
    from osp_shared.checkpoints.release import convert_release

    if len(args.src) > 1 or args.config is not None:
        raise OspError("convert release takes one --src folder and no --config: each model has its own")
    bar = Bar()

    def begin(name: str) -> Callable[[int, int], None]:
        bar.start(name)
        return bar.tell

    with bar:
        for report in convert_release(args.src[0], args.target, options(args), begin):
            bar.stop()
            print_report(report)
    return 0


def options(args: argparse.Namespace) -> Options:
    mindspore_file = args.target.suffix == ".ckpt"
    if mindspore_file and args.to == "torch":
        raise OspError(f"{args.target}: a .ckpt file is MindSpore's; name a .safetensors file or a folder")
    form = args.to or ("mindspore" if mindspore_file else "torch")
    return Options(form, args.dtype and dtypes.parse(args.dtype), parse_size(args.shard_size), args.overwrite)


def config(path: Path | None) -> dict | None:
    """The config that --config names: the file, or the folder that it is in."""
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name != "config.json":
        raise OspError(f"{path}: --config names a config.json or the folder that holds one")
    found = read_config(folder)
    if found is None:
        raise OspError(f"{folder / 'config.json'}: no such file")
    return found


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MiB", "4096"; "0" means no limit. OspError otherwise."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS:
        raise OspError(f"--shard_size {text}: give a size such as 5GB, 500MB or 4GiB, or 0 for one file")
    return int(float(match[1]) * _UNITS[match[2]]) or _NO_LIMIT


def print_source(source: Checkpoint) -> None:
    title = kinds.BY_NAME[source.kind].title if source.kind else "unknown model"
    print(f"{source.path}: {title}, {len(source.shapes)} tensors, {gib(source.nbytes)}, {source.format}")
    for note in source.notes:
        print(f"  {note}")


def print_report(report: Report) -> None:
    if report.done_before:
        print(f"{report.target}: already there from an earlier run, nothing to do")
    else:
        rate = f"{report.seconds:.1f} s, {gib(int(report.nbytes / max(report.seconds, 1e-9)))}/s"
        print(f"{report.target}: {report.tensors} tensors, {gib(report.nbytes)}, {rate}")
    print(f"  fingerprint {report.fingerprint}")


class Bar:
    """Progress on stderr with bytes and time left."""

    def __init__(self) -> None:
        self._bar, self._name = None, "write + verify"

    def start(self, name: str) -> None:
        self._name = name

    def tell(self, n: int, total: int) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=self._name, unit="B", unit_scale=True, unit_divisor=1024, leave=False, miniters=1,
                disable=not sys.stderr.isatty(),
            )  # fmt: skip
        self._bar.update(n)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc) -> None:
        self.stop()
