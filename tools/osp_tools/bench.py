"""`osp bench`: time and memory of the transformer and the autoencoder on both backends, beside a matrix product."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.loading import Weights
from osp_shared.specs import dit, wfvae
from osp_shared.specs.dit import DiTSpec
from osp_shared.specs.wfvae import WFVAESpec
from osp_tools import demo_weights, flops, options
from osp_tools.manifest import write_json

HELP = "speed and memory of both backends beside a plain matrix product"
JOBS = ("transformer", "encode", "decode")

# Made-up weights: the released topology at half its widths, four blocks (two dense, two sparse).
DIT = dataclasses.replace(
    dit.RELEASED, num_attention_heads=12, cross_attention_dim=1152, num_layers=4, caption_channels=1024
)
VAE = dataclasses.replace(
    wfvae.RELEASED, base_channels=64, encoder_energy_flow_hidden_size=32, decoder_energy_flow_hidden_size=64
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help=HELP, description=HELP)
    add = parser.add_argument
    size = {"type": int, "nargs": 3, "metavar": ("T", "H", "W")}
    add("--backend", choices=options.BACKENDS, help="default: every one that is installed")
    add("--device", help="of that backend; default: the accelerator, if any")
    add("--precision", choices=options.PRECISIONS, default="fp32", help="of the models")
    add("--model_path", metavar="PATH", help="transformer to measure; default: four blocks, 1152 wide, made up")
    add("--ae_path", metavar="PATH", help="autoencoder to measure; default: base_channels 64, made up")
    add("--dit_size", default=(17, 256, 256), help="video of the transformer, pixels", **size)
    add("--vae_size", default=(9, 128, 128), help="video of the autoencoder, pixels", **size)
    add("--text_tokens", type=int, default=128, help="text tokens of the transformer")
    add("--repeats", type=int, default=3, help="runs to take the fastest of, after one to warm up")
    add("--json", type=Path, metavar="FILE", help="also write the figures")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.repeats < 1 or args.text_tokens < 1:
        raise OspError("--repeats and --text_tokens must be at least 1")
    backends = [args.backend] if args.backend else [b for b in options.BACKENDS[::-1] if options.installed(b)]
    if not backends:
        raise OspError("no backend is installed: pip install -e '.[torch,mindspore]'")
    if args.device and not args.backend:
        raise OspError("--device needs --backend: the two have different devices")
    with tempfile.TemporaryDirectory(prefix="osp-bench-") as folder:
        paths = _weights(args, Path(folder))
        specs = {
            "transformer": Weights(paths["transformer"], DiTSpec).spec,
            "vae": Weights(paths["vae"], WFVAESpec).spec,
        }
        work = _operations(args, specs)
        rows = [_measure(args, backend, job, paths) for job in JOBS for backend in backends]
    matmul = max(row["matmul"] for row in rows)
    for row in rows:
        row["flop"] = work[row["job"]]
        row["fraction"] = row["flop"] / row["seconds"] / matmul
    print(_report(args, specs, rows, matmul))
    if args.json:
        write_json(args.json, {"rows": rows, "matmul_flops": matmul})


def _weights(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    paths = {"transformer": args.model_path, "vae": args.ae_path}
    for name, spec in (("transformer", DIT), ("vae", VAE)):
        if paths[name] is None:
            tensors = demo_weights.filled(spec) | (spec.constants() if name == "vae" else {})
            demo_weights.write_model(folder / name, spec, tensors)
            paths[name] = str(folder / name)
    return paths


def _operations(args: argparse.Namespace, specs: dict) -> dict[str, int]:
    t, h, w = specs["vae"].latent_size(*args.dit_size)
    encode, decode = flops.autoencoder(specs["vae"], tuple(args.vae_size))
    work = flops.transformer(specs["transformer"], (t, h, w), args.text_tokens)
    return {"transformer": work, "encode": encode, "decode": decode}


def _measure(args: argparse.Namespace, backend: str, job: str, paths: dict[str, str]) -> dict:
    """One job on one backend in a fresh process, so that its peak memory is its own."""
    size = args.dit_size if job == "transformer" else args.vae_size
    path = paths["transformer" if job == "transformer" else "vae"]
    asked = {"backend": backend, "device": args.device, "precision": args.precision, "job": job, "path": path}
    asked |= {"size": list(size), "vae": paths["vae"], "text_tokens": args.text_tokens, "repeats": args.repeats}
    command = [sys.executable, "-m", "osp_tools.bench_worker", json.dumps(asked)]
    print(f"measuring {job} on {backend} ...", file=sys.stderr, flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "GLOG_v": "3"})
    if result.returncode:
        raise OspError(f"bench of {job} on {backend} failed (exit status {result.returncode}); its message is above")
    return json.loads(result.stdout.splitlines()[-1])


def _report(args: argparse.Namespace, specs: dict, rows: list[dict], matmul: float) -> str:
    d, v = specs["transformer"], specs["vae"]
    lines = [
        f"transformer: {d.num_layers} blocks, {d.hidden_size} wide, {d.parameter_count / 1e6:.0f} M parameters; video "
        f"{'x'.join(map(str, args.dit_size))}, {args.text_tokens} text tokens",
        f"autoencoder: base_channels {v.base_channels}, {v.parameter_count / 1e6:.0f} M parameters; video "
        f"{'x'.join(map(str, args.vae_size))}",
        f"{args.precision}, fastest of {args.repeats}; float32 product of 2048 x 2048: {matmul / 1e9:.0f} GFLOP/s",
        "",
        "job          backend       ms   GFLOP   GFLOP/s  of product  peak MiB  beyond loading     ratio",
    ]
    reference = {row["job"]: row["seconds"] for row in rows if row["backend"] == "torch"}
    for row in rows:
        rate = row["flop"] / row["seconds"] / 1e9
        ratio = f"{row['seconds'] / reference[row['job']]:8.2f}" if row["job"] in reference else "       -"
        lines.append(
            f"{row['job']:12} {row['backend']:9}{row['seconds'] * 1e3:7.0f}{row['flop'] / 1e9:8.1f}{rate:10.1f}"
            f"{row['fraction']:11.0%}{row['peak'] / 2**20:11.0f}{(row['peak'] - row['loaded']) / 2**20:18.0f}{ratio}"
        )
    return "\n".join(lines) + "\nratio: time over that of torch"
