"""One measurement of `osp bench`, in a process of its own: prints one JSON line."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import numpy as np

from osp_shared.errors import OspError
from osp_shared.fill import input_tensor
from osp_shared.loading import Weights
from osp_shared.specs.wfvae import WFVAESpec
from osp_tools import cli, options

SIDE = 2048  # of the plain matrix product


def main(asked: dict) -> dict:
    args = argparse.Namespace(backend=asked["backend"], device=asked["device"])
    backend = options.select_backend(args)
    call = _job(asked, backend)
    loaded = _peak()
    call()  # tables, caches, thread pools
    seconds = min(_timed(call) for _ in range(asked["repeats"]))
    peak = _peak()
    return {
        "job": asked["job"],
        "backend": backend.name,
        "device": backend.device,
        "seconds": seconds,
        "loaded": loaded,
        "peak": peak,
        "matmul": _matmul(backend),
    }


def _job(asked: dict, backend: options.Selected):
    """A function of no arguments that does the job once."""
    how = {"dtype": asked["precision"], "device": backend.device}
    size = tuple(asked["size"])
    if asked["job"] == "transformer":
        dit = backend.module.load_dit(asked["path"], **how)
        latent = Weights(asked["vae"], WFVAESpec).spec.latent_size(*size)
        latents = input_tensor("latents", (1, dit.spec.input_channels, *latent))
        text = input_tensor("text", (1, 1, asked["text_tokens"], dit.spec.caption_channels))
        mask = np.ones(text.shape[:3], np.float32)
        return lambda: dit(latents, np.array([500.0], np.float32), text, mask)
    vae = backend.module.load_vae(asked["path"], **how)
    if asked["job"] == "encode":
        video = np.clip(input_tensor("video", (1, 3, *size)), -1, 1)
        return lambda: vae.encode(video)
    latents = input_tensor("latents", (1, vae.spec.latent_dim, *vae.spec.latent_size(*size)))
    return lambda: vae.decode(latents)


def _timed(call) -> float:
    start = time.perf_counter()
    call()  # results are numpy arrays: the work is done when it returns
    return time.perf_counter() - start


def _peak() -> int:
    """Bytes of the largest resident set so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _matmul(backend: options.Selected) -> float:
    """FLOP/s of a float32 product in the backend's framework."""
    a = input_tensor("matmul", (SIDE, SIDE))
    if backend.name == "torch":
        import torch

        x = torch.from_numpy(a).to(backend.device)
        call = lambda: float((x @ x)[0, 0])  # noqa: E731
    else:
        import mindspore as ms

        x = ms.Tensor(a)
        call = lambda: float(ms.ops.matmul(x, x)[0, 0].asnumpy())  # noqa: E731
    call()
    return 2 * SIDE**3 / min(_timed(call) for _ in range(5))


if __name__ == "__main__":
    try:
        print(json.dumps(main(json.loads(sys.argv[1]))))
    except OspError as error:
        sys.exit(cli.fail(str(error)))
