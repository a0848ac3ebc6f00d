"""`osp parity --full-size`: the 2.77 B transformer in both backends, a part's weights in memory at a time.

The real models run a real forward pass; each part (a stem, a block, the head) reads its weights when it is called and
drops them when it returns. Weights are the deterministic fill of their names, so nothing is downloaded. Three passes:
torch in float64 (truth), torch in float32 (what float32 costs), MindSpore in float32.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from osp_shared import fill
from osp_shared.specs.dit import RELEASED, DiTSpec
from osp_shared.traces.bounds import Bound, bound, floor
from osp_shared.traces.metrics import Distance, distance

MEMORY_LIMIT = 3.0  # GiB
STEMS = ("pos_embed", "adaln_single", "caption_projection")


@dataclass(frozen=True)
class Part:
    """One part's output: errors against float64, and the two float32 outputs against each other."""

    path: str
    own: Distance
    error: Distance
    apart: Distance
    bound: Bound

    @property
    def fraction(self) -> float:
        return self.bound.fraction(self.error)


def full_size_parity(
    spec: DiTSpec = RELEASED, size: tuple[int, int, int] = (2, 10, 8), tokens: int = 16, salt: str = "",
    say: Callable[[str], None] = print,
) -> int:  # fmt: skip
    """Compare every part's output of both backends on one small latent; print a table.

    size: latent (frames, height, width); the default has 40 tokens, which sparse blocks pad to 48. tokens: of text, the
    last quarter masked.

    Returns:
        0 when every part is within its bound and the process stayed under 3 GiB, else 1.
    """
    start = time.perf_counter()
    say(f"{spec.class_name()}: {spec.parameter_count / 1e9:.2f} B parameters, latent {size}, {tokens} text tokens")
    arrays = _inputs(spec, size, tokens, salt)
    truth = _torch_pass(spec, arrays, salt, "fp64")
    reference = _torch_pass(spec, arrays, salt, "fp32")
    candidate = _mindspore_pass(spec, arrays, salt)
    parts = compare_parts(spec, truth, reference, candidate)
    for line in table(parts):
        say(line)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    worst = max(parts, key=lambda p: p.fraction)
    passed = worst.fraction <= 1 and memory < MEMORY_LIMIT
    say(f"worst: {worst.path}, {worst.fraction:.2f} of its bound; {len(parts)} parts")
    say(f"{time.perf_counter() - start:.0f} s, peak memory {memory:.2f} GiB of {MEMORY_LIMIT:.0f}: "
        + ("passed" if passed else "FAILED"))  # fmt: skip
    return 0 if passed else 1


def part_paths(spec: DiTSpec) -> list[str]:
    """Submodules whose weights are read and dropped together."""
    extra = {n.split(".")[0] for n in spec.parameters() if n.startswith("pos_embed_")}
    return [*STEMS, *sorted(extra), *(f"transformer_blocks.{i}" for i in range(spec.num_layers)), "proj_out"]


def compare_parts(spec: DiTSpec, truth: dict, reference: dict, candidate: dict) -> list[Part]:
    """Outputs of the three passes, in execution order. Errors add up along the blocks, in every pass alike."""
    parts = []
    longest = 4 * spec.hidden_size  # the widest sum in a block
    for path, exact in truth.items():
        own, error = distance(reference[path], exact), distance(candidate[path], exact)
        apart = distance(candidate[path], reference[path])
        limit = bound("float32", error.scale, float(np.abs(exact).max()), floor("float32", longest), own)
        parts.append(Part(path, own, error, apart, limit))
    return parts


def table(parts: list[Part]) -> list[str]:
    titles = ("torch fp32", "mindspore", "apart", "bound")
    lines = [f"{'part':<30} {'rms':>9} " + " ".join(f"{title:>11}" for title in titles) + f" {'of bound':>9}"]
    for p in parts:
        lines.append(
            f"{p.path:<30} {p.error.scale:9.3g} {p.own.rel_l2:11.2e} {p.error.rel_l2:11.2e} {p.apart.rel_l2:11.2e} "
            f"{p.bound.rel_l2:11.2e} {p.fraction:9.2f}"
        )
    return lines


def _inputs(spec: DiTSpec, size, tokens, salt) -> list[np.ndarray]:
    mask = np.ones((1, 1, tokens), np.float32)
    mask[..., tokens - tokens // 4 :] = 0
    return [
        fill.input_tensor("latents", (1, spec.input_channels, *size), salt),
        np.array([999.0], np.float32),
        fill.input_tensor("text", (1, 1, tokens, spec.caption_channels), salt),
        np.ones((1, *size), np.float32),
        mask,
    ]


def _reader(spec: DiTSpec, salt: str) -> Callable[[str], np.ndarray]:
    shapes = spec.parameters()
    return lambda name: fill.parameter(name, shapes[name], salt)


class _Progress:
    """Collects parts' outputs and shows how far a pass is."""

    def __init__(self, title: str, count: int):
        from tqdm import tqdm

        self.found: dict[str, np.ndarray] = {}
        self.bar = tqdm(total=count, desc=title, unit="part", file=sys.stderr)

    def add(self, path: str, array: np.ndarray) -> None:
        self.found[path] = array
        self.bar.update()

    def finish(self, output: np.ndarray) -> dict[str, np.ndarray]:
        self.bar.close()
        return {**self.found, "output": output}


def _first(output):
    return output[1] if isinstance(output, tuple) else output  # adaln_single: (embedding, modulation of all blocks)


def _torch_pass(spec: DiTSpec, arrays, salt, dtype) -> dict[str, np.ndarray]:
    import torch

    from osp_torch.dit.model import model_class
    from osp_torch.streaming import stream

    parts = part_paths(spec)
    progress = _Progress(f"torch {dtype}", len(parts))

    def observe(path, output):
        progress.add(path, _first(output).numpy())

    with torch.no_grad():
        model = stream(model_class(spec), spec, parts, _reader(spec, salt), dtype, observe)
        output = model(*(torch.from_numpy(a) for a in arrays))
    return progress.finish(output.numpy())


def _mindspore_pass(spec: DiTSpec, arrays, salt) -> dict[str, np.ndarray]:
    from osp_mindspore.dit.model import model_class
    from osp_mindspore.streaming import stream

    import mindspore as ms

    parts = part_paths(spec)
    progress = _Progress("mindspore fp32", len(parts))

    def observe(path, output):
        progress.add(path, _first(output).asnumpy().copy())

    model = stream(model_class(spec), spec, parts, _reader(spec, salt), "fp32", observe)
    output = model(*(ms.Tensor(a) for a in arrays))
    return progress.finish(output.asnumpy().copy())
