"""Both backends against the numbers recorded from the original WFVAE: outputs, layer records, Haar, posterior, scale.

What float32 may cost is measured for every tensor (see wfvae_models); the recorded numbers themselves carry one such
error, the candidate another.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

import golden_files
import wfvae_models as vaes
from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.geometry.chunks import Tiling
from osp_shared.specs.wfvae import WFVAESpec

CASES = golden_files.items("wfvae", "cases", lambda case: case["id"])


def with_section(section):
    """Parametrize over the files that have it."""
    files = golden_files.files("wfvae", section)
    return pytest.mark.parametrize("golden", [pytest.param(golden_files.load(p), id=p.stem) for p in files])


def salt(golden) -> str:
    return golden["header"].get("salt", "")


def spec_of(golden, name) -> WFVAESpec:
    return WFVAESpec.from_config(golden["configs"][name])


def draw(golden, label: str) -> np.ndarray:
    """The input that a label like input:video:1x3x9x32x32 names."""
    _, tag, shape = label.split(":")
    return fill.input_tensor(tag, tuple(int(n) for n in shape.split("x")), salt(golden))


def samples(flat: np.ndarray, count: int) -> np.ndarray:
    return flat[[(2654435761 * j + 97) % flat.size for j in range(count)]]


def check_row(name: str, array: np.ndarray, row: list, tolerance: float) -> None:
    """A row is [shape, mean, std, norm, samples], or [shape, all values]."""
    shape, *statistics, values = row
    assert list(array.shape) == shape, f"{name}: shape {array.shape}, recorded {shape}"
    flat = array.astype(np.float64).reshape(-1)
    seen = samples(flat, len(values)) if statistics else flat
    worst = np.abs(seen - np.array(values)).max()
    assert worst <= tolerance, f"{name}: {worst:.2e} from the recorded samples, allowed {tolerance:.2e}"
    if statistics:
        found = [flat.mean(), flat.std(), np.linalg.norm(flat)]
        slack = [tolerance, tolerance, tolerance * flat.size**0.5]
        for kind, a, b, limit in zip(("mean", "std", "norm"), found, statistics, slack, strict=True):
            assert abs(a - b) <= limit, f"{name}: {kind} {a}, recorded {b}, allowed {limit:.2e}"


def run(golden, case, backend):
    """({path: outputs}, {mean, logvar, dec: output}) of one case."""
    vae = vaes.build(backend, spec_of(golden, case["cfg"]), salt(golden))
    chunk = {key: case[key] for key in ("t_chunk_enc", "t_chunk_dec") if key in case}
    plan = Tiling("upstream", **chunk) if case.get("tile") else None
    x = vae.tensor(draw(golden, case["input"]))
    outputs = {}
    with vae.no_grad(), vae.record({row[0] for row in case.get("trace", ())}) as layers:
        latents = x
        if case["op"] != "decode":
            posterior = vae.model.encode(x, plan)
            outputs = {"mean": posterior.mean, "logvar": posterior.logvar}
            latents = posterior.mode()
        if case["op"] != "encode":
            outputs["dec"] = vae.model.decode(latents, plan)
    return layers, {name: vae.array(t) for name, t in outputs.items()}


_last = {}  # the two torch runs of one case: its tests, one a backend, follow each other


def references(golden, case):
    """Runs of the case in float64 and float32 torch."""
    key = (id(golden), case["id"])
    if key not in _last:
        _last.clear()
        _last[key] = run(golden, case, "truth"), run(golden, case, "torch")
    return _last[key]


@pytest.mark.parametrize("backend", vaes.BACKENDS)
@pytest.mark.parametrize("golden, case", CASES)
def test_case(golden, case, backend):
    (true_layers, true_outputs), own = references(golden, case)
    own_layers, own_outputs = own
    layers, outputs = own if backend == "torch" else run(golden, case, backend)
    allowance = vaes.Allowance()
    batch = draw(golden, case["input"]).shape[0]
    for path, call, *row in case.get("trace", ()):
        assert path in layers, f"no layer {path}"
        array, truth, own = (
            vaes.frames_unfolded(record[path][call], batch) for record in (layers, true_layers, own_layers)
        )
        check_row(f"{path} call {call}", array, row, allowance(truth, own))
    for name, row in case["out"].items():
        check_row(name, outputs[name], row, allowance(true_outputs[name], own_outputs[name]))


@with_section("fill_probe_first4")
def test_fill_rule(golden):
    """The weights and inputs that everything else here is computed from."""
    shapes = [spec_of(golden, name).parameters() for name in golden["configs"]]
    for label, first in golden["fill_probe_first4"].items():
        if label.startswith("input:"):
            drawn = [draw(golden, label)]
        else:
            drawn = [fill.parameter(label, s[label], salt(golden)) for s in shapes if label in s]
        starts = [d.reshape(-1)[:4] for d in drawn]
        assert any(np.allclose(s, np.float32(first), rtol=2 * vaes.UNIT) for s in starts), label


@with_section("configs")
def test_configs(golden):
    for name, config in golden["configs"].items():
        spec = spec_of(golden, name)
        assert spec.parameter_count == config["_num_parameters"], name
        assert len(spec.parameters()) == config["_num_state_entries"], name


@pytest.mark.parametrize("backend", vaes.BACKENDS)
@with_section("raises")
def test_raises(golden, backend):
    """Lengths that the original's chunks cannot do end in an error here too, and no other."""
    wrong = []
    for label, raises in golden["raises"].items():
        deep, half, chunk, tiled, axis, size = re.fullmatch(
            r"err_(888_)?(enc|dec)(\d*)_(tiled_)?([tTh])(\d+)", label
        ).groups()
        specs = (spec_of(golden, name) for name in golden["configs"])
        spec = next(s for s in specs if s.level1_is_3d == bool(deep))
        vae = vaes.build(backend, spec, salt(golden))
        plan = Tiling("upstream", **({f"t_chunk_{half}": int(chunk)} if chunk else {})) if tiled else None
        frames, height = (1, int(size)) if axis == "h" else (int(size), 16)
        shape = (1, 3, frames, height, 16) if half == "enc" else (1, spec.latent_dim, frames, height // 8, 2)
        x = vae.tensor(fill.input_tensor("video" if half == "enc" else "latent", shape))
        try:
            with vae.no_grad():
                vae.model.encode(x, plan) if half == "enc" else vae.model.decode(x, plan)
            raised = False
        except OspError:
            raised = True
        if raised != raises:
            wrong.append(f"{label}: {'an error' if raised else 'none'}")
    assert not wrong, wrong


def haar_layers(backend):
    """The four transforms, as functions of arrays; `later` marks a chunk that is not the first."""
    if backend == "mindspore":
        import osp_mindspore  # noqa: F401
        from osp_mindspore.wfvae import modules

        from mindspore import Tensor

        wrap, unwrap = Tensor, lambda t: t.asnumpy()
    else:
        import torch

        from osp_torch.wfvae import modules

        wrap, unwrap = torch.from_numpy, lambda t: t.detach().numpy()

    class Later:
        first = False

    def call(layer, x, cache=None):
        return unwrap(layer(wrap(np.ascontiguousarray(x)), cache))

    return {
        "fwd3d": lambda x: call(modules.HaarWaveletTransform3D(), x),
        "inv3d": lambda x: call(modules.InverseHaarWaveletTransform3D(), x),
        "inv3d_later": lambda x: call(modules.InverseHaarWaveletTransform3D(), x, Later),
        "fwd2d": lambda x: call(modules.HaarWaveletTransform2D(), x),
        "inv2d": lambda x: call(modules.InverseHaarWaveletTransform2D(), x),
    }


@pytest.mark.parametrize("backend", vaes.BACKENDS)
@with_section("haar")
def test_haar(golden, backend):
    """Labels chain: an inverse is taken `of_that`, the last forward result; `same_input` is the last input."""
    layers = haar_layers(backend)
    x = last = None
    for label, row in golden["haar"].items():
        kind = label[:5]
        if found := re.search(r"input:\w+:[\dx]+", label):
            x = draw(golden, found.group())
        elif found := re.search(r"arange\((\d+)\)\^2/(\d+) as ([\dx]+)", label):
            count, divisor, shape = found.groups()
            x = (np.arange(int(count), dtype=np.float32) ** 2 / np.float32(divisor)).reshape(
                [int(n) for n in shape.split("x")]
            )
        if kind.startswith("fwd"):
            source = x
            last = array = layers[kind](x)
        else:
            source = last
            array = layers[kind + ("_later" if "later_chunk" in label else "")](last)
        # Eight products and sums of numbers as large as the input's largest, with taps of at most one half.
        check_row(label, array, row, 8 * vaes.UNIT * 8 * 0.5 * float(np.abs(source).max()))


@pytest.mark.parametrize("backend", vaes.BACKENDS)
@with_section("posterior")
def test_posterior(golden, backend):
    section = golden["posterior"]
    found, truth, own = (posterior_numbers(golden, section, b) for b in (backend, "truth", "torch"))
    for label, row in section.items():
        if label not in ("cfg", "input"):
            check_row(label, found[label], row, vaes.Allowance()(truth[label], own[label]))


def posterior_numbers(golden, section, backend):
    vae = vaes.build(backend, spec_of(golden, section["cfg"]), salt(golden))
    labels = {"std": "std", "kl": "kl"}
    with vae.no_grad():
        posterior = vae.model.encode(vae.tensor(draw(golden, section["input"])))
        numbers = {label: vae.array(getattr(posterior, name)) for label, name in labels.items() if name == "std"}
        numbers["kl"] = vae.array(posterior.kl())
        mean, logvar = vae.array(posterior.mean), vae.array(posterior.logvar)
        for label in section:
            if noise := re.search(r"input:noise:[\dx]+", label):
                drawn = vae.tensor(draw(golden, noise.group()))
                numbers[label] = vae.array(posterior.sample(drawn))
                numbers["nll_of_noise"] = vae.array(posterior.nll(drawn))
            elif raw := re.search(r"raw_is_(\d+)x", label):
                moments = np.concatenate([mean, logvar * np.float32(raw.group(1))], 1)
                numbers[label] = vae.array(type(posterior)(vae.tensor(moments)).logvar)
    return numbers


@pytest.mark.parametrize("backend", vaes.BACKENDS)
@with_section("wrapper")
def test_scaled_latents(golden, backend):
    section = golden["wrapper"]
    latent, video = "encode_with_mode_instead_of_sample", "decode_of_that(b,t,c,h,w)"
    spec = spec_of(golden, section["cfg"])
    assert spec.scale_and_shift() == (tuple(section["scale"]), tuple(section["shift"]))
    results = []
    for name in (backend, "truth", "torch"):
        vae = vaes.build(name, spec, salt(golden))
        with vae.no_grad():
            z = vae.model.encode_scaled(vae.tensor(draw(golden, section["input"])))
            results.append((vae.array(z), vae.array(vae.model.decode_scaled(z)).swapaxes(1, 2)))
    found, truth, own = results
    allowance = vaes.Allowance()
    for i, label in enumerate((latent, video)):
        check_row(label, found[i], section[label], allowance(truth[i], own[i]))
