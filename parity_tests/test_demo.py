"""The demo's hand-set weights and verdict, and the operation counts of `osp bench`."""

import dataclasses

import numpy as np
import pytest

from cli_support import moving_clip
from osp_shared.specs import wfvae
from osp_tools import bench, demo, demo_picture, demo_weights, flops


def half(pixels: np.ndarray, numbers: np.ndarray) -> dict:
    return {"rec": pixels, "sample": pixels, "rec_float": numbers, "latents": numbers}


def test_the_verdict_of_the_demo():
    """One grey level anywhere is agreement; two on more than a thousandth of the pixels is not."""
    pixels, numbers = np.full((4, 32, 32, 3), 100, np.uint8), np.ones((3, 4, 32, 32), np.float32)
    rows = demo.differences(half(pixels, numbers), half(pixels + 1, numbers * 1.5))
    assert all(r["within_1"] == 1 and r["max"] == 1 and r["same"] == 0 for r in rows)
    assert rows[0]["float_error"] == pytest.approx(0.5)
    apart = pixels.copy()
    apart.reshape(-1)[: pixels.size // 500] += 2
    rows = demo.differences(half(pixels, numbers), half(apart, numbers))
    assert all(r["within_1"] < demo.SHARE and r["max"] == 2 for r in rows)


def test_the_sheet_shows_both_backends_and_their_difference():
    original = moving_clip(3, 32, 64)
    a = half(original, np.ones(1)) | {"sample": original}
    b = half(original + np.uint8(1), np.ones(1)) | {"sample": original}
    sheet = demo_picture.sheet(original, a, b)
    top = 2 * demo_picture.BAR + 32 + demo_picture.BAR  # note, first row, caption of the second
    assert np.array_equal(sheet[2 * demo_picture.BAR :][:32, :64], original[1])
    assert (sheet[top : top + 32, 64:128] == demo_picture.GAIN).all()
    assert len(list(demo_picture.film(original, a, b))) == 3


def test_the_hand_set_autoencoder_reconstructs_what_it_never_saw():
    """The wavelet path carries a clip through; shutting the path shows that nothing else does."""
    from osp_torch.checkpoint import build
    from osp_torch.wfvae.model import WFVAEModel

    torch = pytest.importorskip("torch")
    weights = demo_weights.autoencoder()
    assert sum(w.nbytes for w in weights.values()) < 4 << 20
    clip = moving_clip(9, 64, 96)
    video = torch.from_numpy(clip.transpose(3, 0, 1, 2)[None] / 127.5 - 1).float()

    def error(tensors: dict) -> float:
        model = build(WFVAEModel, demo_weights.VAE, tensors.__getitem__)
        with torch.no_grad():
            latents = model.encode(video).mode()
            assert 0.5 < float(latents[:, :3].std()) / demo_weights.SPREAD < 2, "latents have the released scale"
            return float((model.decode(latents) - video).square().mean().sqrt())

    assert error(weights) < 0.25
    shut = "decoder.connect_l2.2.weight"
    assert error(weights | {shut: np.zeros_like(weights[shut])}) > 0.5


def test_operations_are_those_that_torch_counts():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from osp_torch.dit.model import DiT
    from osp_torch.wfvae.model import WFVAEModel

    spec = dataclasses.replace(demo_weights.DIT, num_layers=5)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        DiT(spec)(torch.zeros(1, 8, 3, 8, 10), torch.zeros(1), torch.zeros(1, 1, 16, 8), None, torch.ones(1, 1, 16))
    assert flops.transformer(spec, (3, 8, 10), 16) == count.get_total_flops()
    deep = dataclasses.replace(demo_weights.VAE, **wfvae._DEEP)
    for vae in (demo_weights.VAE, deep):
        model = WFVAEModel(vae)
        with FlopCounterMode(display=False) as encode, torch.no_grad():
            latents = model.encode(torch.zeros(1, 3, 9, 32, 48)).mode()
        with FlopCounterMode(display=False) as decode, torch.no_grad():
            model.decode(latents)
        for ours, counted in zip(flops.autoencoder(vae, (9, 32, 48)), (encode, decode), strict=True):
            haar = counted.get_total_flops() - ours
            assert 0 <= haar < 0.025 * ours, "all but the Haar filters, which are 1-2 % at this width"


def test_bench_sizes_are_the_released_topology():
    for ours, released in ((bench.DIT, bench.dit.RELEASED), (bench.VAE, wfvae.RELEASED)):
        same = {"sparse1d", "sparse_n", "attention_head_dim", "patch_size", "norm_type", "t_interpolation"}
        for name in same & set(vars(ours)):
            assert getattr(ours, name) == getattr(released, name)
