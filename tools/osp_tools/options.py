"""Options that several commands share: backend and device, precision, the autoencoder and its tiling."""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from osp_shared.errors import OspError
from osp_shared.geometry.chunks import CELL, EXACT, UPSTREAM, Tiling
from osp_shared.specs.fields import read_object
from osp_shared.specs.wfvae import WFVAESpec

BACKENDS = ("mindspore", "torch")
PRECISIONS = ("bf16", "fp16", "fp32")

RANKS = "start one process a device, each with RANK and WORLD_SIZE set; they share the work"

# Arguments of the MindSpore port that have nothing to do here; naming one says why, rather than doing nothing.
LEFT_OUT = {
    "--mode": "there is no graph mode here, models run eagerly: leave it out",
    "--jit_level": "there is no graph mode here, models run eagerly: leave it out",
    "--jit_syntax_level": "there is no graph mode here, models run eagerly: leave it out",
    "--precision_mode": "Ascend's global precision modes are not used; choose with --precision",
    "--vae_keep_gn_fp32": "norms compute in float32 at every precision: leave it out",
    "--amp_level": "which layers stay in float32 is fixed as in the original: choose with --precision",
    "--use_parallel": RANKS,
    "--parallel_mode": RANKS,
    "--local_rank": "ranks are read from RANK and WORLD_SIZE: leave it out",
    "--world_size": "ranks are read from RANK and WORLD_SIZE: leave it out",
    "--cache_dir": "nothing is downloaded: paths are local folders",
    "--compile": "models run eagerly: leave it out",
    "--profile": "use osp bench",
}

AUTOENCODERS = {f"WFVAEModel_D{d}_{t}x8x8": (d, t) for d, t in ((8, 4), (16, 4), (32, 4), (32, 8))}


@dataclass(frozen=True)
class Selected:
    """A backend module (osp_torch.backend or osp_mindspore.backend) and the device its models go to."""

    name: str
    module: ModuleType
    device: str

    @property
    def on_cpu(self) -> bool:
        return self.device.lower() == "cpu"

    def precision(self, wanted: str | None, accelerated: str) -> str:
        """The user's choice, or float32 on a CPU (half types are slower and coarser there), `accelerated` elsewhere."""
        return wanted or ("fp32" if self.on_cpu else accelerated)

    def release(self) -> None:
        """Give back the memory of models that were dropped."""
        if self.name == "mindspore":  # its executor keeps the last model that ran, until another runs
            importlib.import_module("osp_mindspore.runtime").reset_precision()
        gc.collect()
        if not self.on_cpu and self.name == "torch":
            importlib.import_module("torch").cuda.empty_cache()
        elif not self.on_cpu:
            importlib.import_module("mindspore").runtime.empty_cache()


# ------------------------------------------------------------------------------------------------ backend, device


def add_backend(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("backend")
    group.add_argument("--backend", choices=BACKENDS, help="default: the one installed; mindspore when both are")
    group.add_argument(
        "--device", help="CPU or Ascend[:n] (mindspore); cpu, cuda[:n] or GPU (torch); default: the accelerator, if any"
    )


def add_left_out(parser: argparse.ArgumentParser, **more: str) -> None:
    """Refuse the port's arguments without effect by name; `more` adds the command's own."""
    own = {f"--{flag}": reason for flag, reason in more.items()}
    known = {o for action in parser._actions for o in action.option_strings}
    parser.left_out = {flag: why for flag, why in (LEFT_OUT | own).items() if flag not in known}


def installed(backend: str) -> bool:
    return importlib.util.find_spec(backend) is not None


def select_backend(args: argparse.Namespace) -> Selected:
    """Import the backend of --backend and --device.

    Raises:
        OspError: it is not installed, or it has no such device.
    """
    present = [name for name in BACKENDS if installed(name)]
    name = args.backend or (present[0] if present else "mindspore")
    if name not in present:
        raise OspError(f"backend {name} is not installed: pip install -e '.[{name}]'")
    return _select_mindspore(args.device) if name == "mindspore" else _select_torch(args.device)


def _select_mindspore(wanted: str | None) -> Selected:
    kind, _, number = (wanted or "").partition(":")
    if kind.lower() not in ("", "cpu", "ascend", "npu"):
        raise OspError(f"device {wanted}: the mindspore backend runs on Ascend or CPU (a GPU: --backend torch)")
    if kind:  # read once, when the package is imported
        os.environ["OSP_DEVICE"] = "CPU" if kind.lower() == "cpu" else "Ascend"
    if number or "LOCAL_RANK" in os.environ:
        os.environ.setdefault("DEVICE_ID", number or os.environ["LOCAL_RANK"])
    module = importlib.import_module("osp_mindspore.backend")
    runtime = importlib.import_module("osp_mindspore.runtime")
    if kind:
        runtime.select("CPU" if kind.lower() == "cpu" else "Ascend")
    return Selected("mindspore", module, runtime.device())


def _select_torch(wanted: str | None) -> Selected:
    kind, colon, number = (wanted or "").lower().partition(":")
    if kind in ("ascend", "npu"):
        raise OspError(f"device {wanted}: the torch backend runs on cpu or cuda (Ascend: --backend mindspore)")
    module = importlib.import_module("osp_torch.backend")
    torch = importlib.import_module("torch")
    if not kind:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "cuda" if kind == "gpu" else kind
    if kind == "cuda" and not number and "LOCAL_RANK" in os.environ:
        colon, number = ":", os.environ["LOCAL_RANK"]
    return Selected("torch", module, kind + colon + number)


def ranks() -> tuple[int, int]:
    """(rank, number of processes) of a launcher: RANK and WORLD_SIZE, or the RANK_ID and RANK_SIZE of msrun.

    Raises:
        OspError: values that are not 0 <= rank < number.
    """
    for rank_name, world_name in (("RANK", "WORLD_SIZE"), ("RANK_ID", "RANK_SIZE")):
        rank, world = os.environ.get(rank_name), os.environ.get(world_name)
        if rank is None or world is None:
            continue
        if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
            raise OspError(f"{rank_name}={rank} {world_name}={world}: must be 0 <= rank < number of processes")
        return int(rank), int(world)
    return 0, 1


# ------------------------------------------------------------------------------------------------ autoencoder


def add_autoencoder(
    parser: argparse.ArgumentParser, *, temporal: bool = True, spatial_default: int | None = None
) -> None:
    """--ae ... and the tiling options; `temporal` where there is more than one frame to cut."""
    group = parser.add_argument_group("autoencoder")
    group.add_argument("--ae", metavar="NAME", help=f"check that the weights are this one: {', '.join(AUTOENCODERS)}")
    group.add_argument("--ae_path", metavar="PATH", help="folder or weight file, any format that osp inspect reads")
    add_tiling(group, temporal=temporal, spatial_default=spatial_default)


def add_tiling(group, *, temporal: bool, spatial_default: int | None = None) -> None:
    if temporal:
        group.add_argument("--enable_tiling", action="store_true", help="run the autoencoder in chunks of frames")
        group.add_argument(
            "--tiling_mode",
            choices=(EXACT, UPSTREAM),
            help=f"{EXACT}: chunks equal the whole pass at every length (default); {UPSTREAM}: the original's chunks, "
            "which get the last frames of some lengths wrong",
        )
    else:
        group.add_argument("--enable_tiling", action="store_true", help="run the autoencoder in overlapping tiles")
    group.add_argument(
        "--tile_sample_min_size",
        type=int,
        metavar="PIXELS",
        help="side of spatial tiles with blended overlap, for bounded memory"
        + (f" (default {spatial_default})" if spatial_default else " (default: no spatial tiles)"),
    )
    group.add_argument(
        "--tile_overlap_factor", type=float, metavar="F", help="overlapping share of a tile (default 0.25)"
    )


def tiling(
    args: argparse.Namespace, spatial_default: int | None = None, chunks: tuple[int, int] = (8, 2)
) -> Tiling | None:
    """The Tiling that the options ask for, None for the whole at once.

    Raises:
        OspError: an option that would do nothing, or a value outside its range.
    """
    mode = getattr(args, "tiling_mode", None)
    side = args.tile_sample_min_size
    if mode and not args.enable_tiling:
        raise OspError("--tiling_mode does nothing without --enable_tiling")
    if spatial_default and args.enable_tiling:
        side = side or spatial_default
    elif spatial_default and side:
        raise OspError("--tile_sample_min_size does nothing without --enable_tiling")
    if args.tile_overlap_factor is not None and not side:
        raise OspError("--tile_overlap_factor does nothing without --tile_sample_min_size: chunks of frames share none")
    temporal = (mode or EXACT) if args.enable_tiling and not spatial_default else None
    if temporal is None and side is None:
        return None
    factor = 0.25 if args.tile_overlap_factor is None else args.tile_overlap_factor
    if not 0 <= factor <= 0.5:
        raise OspError(f"--tile_overlap_factor {factor}: must be from 0 to 0.5")
    overlap = 0 if side is None else round(side * factor / CELL) * CELL
    return Tiling(temporal, *chunks, tile_size=side, tile_overlap=min(overlap, (side or 0) // 2 // CELL * CELL))


def vae_path(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """(weights, config in place of the one beside them or None) of --ae_path, --ms_checkpoint and --model_config.

    Raises:
        OspError: no weights named, or a config that cannot be read.
    """
    path = getattr(args, "ms_checkpoint", None) or args.ae_path
    if not path:
        raise OspError("no autoencoder: give --ae_path, the folder with its config.json and weights")
    config = None
    if getattr(args, "model_config", None):
        config = read_object(args.model_config)
    elif getattr(args, "ms_checkpoint", None) and args.ae_path:
        beside = Path(args.ae_path) / "config.json"
        config = read_object(beside) if beside.is_file() else None
    return path, config


def check_ae_name(name: str | None, spec: WFVAESpec) -> None:
    """Raises OspError unless `name` is a known autoencoder and the one that `spec` describes; None is any."""
    if name is None:
        return
    if name not in AUTOENCODERS:
        older = "CausalVAEModel is v1.1 and v1.2's; " if name.startswith("CausalVAE") else ""
        raise OspError(f"--ae {name}: {older}must be one of {', '.join(AUTOENCODERS)}")
    found = (spec.latent_dim, spec.stride[0])
    if AUTOENCODERS[name] != found:
        raise OspError(f"--ae {name}: the weights are a WFVAEModel_D{found[0]}_{found[1]}x8x8")
