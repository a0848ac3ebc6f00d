"""WFVAE, torch against MindSpore on the same weights and inputs: every layer, every gradient, half types."""

from __future__ import annotations

import numpy as np
import pytest

import wfvae_models as vaes
from osp_shared import fill
from osp_shared.geometry.chunks import Tiling
from osp_shared.specs.wfvae import WFVAESpec

_DEEP = {
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
_NARROW = {"base_channels": 8, "encoder_energy_flow_hidden_size": 4, "decoder_energy_flow_hidden_size": 12}

# Together: both norms, both interpolations, with and without attention, 0 to 2 connecting blocks, 4x8x8 and 8x8x8.
CONFIGS = {
    "released topology": (
        {**_NARROW, "norm_type": "layernorm", "t_interpolation": "trilinear", "connect_res_layer_num": 2},
        (2, 3, 6, 25, 16),
    ),
    "groupnorm, nearest": (
        {
            "base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 64,
            "latent_dim": 4, "encoder_num_resblocks": 1, "decoder_num_resblocks": 1, "scale": [0.5, 1.0, 2.0, 4.0],
            "shift": [0.0, 1.0, -1.0, 0.5],
        },
        (2, 3, 5, 16, 8),
    ),
    "no attention": (
        {
            **_NARROW, "norm_type": "layernorm", "use_attention": False, "connect_res_layer_num": 0,
            "encoder_num_resblocks": 3,
        },
        (1, 3, 5, 16, 24),
    ),
    "8x8x8": ({**_NARROW, "norm_type": "layernorm", "t_interpolation": "trilinear", **_DEEP}, (1, 3, 17, 16, 16)),
    "one frame": ({**_NARROW, "norm_type": "layernorm", "t_interpolation": "trilinear"}, (2, 3, 1, 24, 40)),
}  # fmt: skip


@pytest.fixture(params=list(CONFIGS))
def case(request):
    """(spec, video, noise for the posterior)."""
    config, shape = CONFIGS[request.param]
    spec = WFVAESpec.from_config(config)
    latent = (shape[0], spec.latent_dim, *spec.latent_size(*shape[2:]))
    return spec, fill.input_tensor("video", shape), fill.input_tensor("noise", latent)


def forward(backend, case):
    spec, video, noise = case
    vae = vaes.build(backend, spec)
    with vae.no_grad(), vae.record() as layers:
        video, posterior = vae.model(vae.tensor(video), vae.tensor(noise))
    return layers, {"video": vae.array(video), "mean": vae.array(posterior.mean), "std": vae.array(posterior.std)}


def test_every_layer(case):
    truth, own, found = (forward(b, case) for b in ("truth", "torch", "mindspore"))
    assert set(truth[0]) == set(found[0]), "modules of one backend only"
    allowance = vaes.Allowance()
    for path, calls in truth[0].items():  # in the order of execution
        for exact, reference, array in zip(calls, own[0][path], found[0][path], strict=True):
            worst = np.abs(array - exact).max()
            allowed = allowance(exact, reference)
            assert worst <= allowed, f"{path}: {worst:.2e} from float64, allowed {allowed:.2e}"
    for name in truth[1]:
        worst, allowed = np.abs(found[1][name] - truth[1][name]).max(), allowance(truth[1][name], own[1][name])
        assert worst <= allowed, f"{name}: {worst:.2e} from float64, allowed {allowed:.2e}"


def objective(video, posterior, projection):
    """A scalar that every output moves: a random projection of the video, and the KL divergence."""
    return (video * projection).sum() + 0.01 * posterior.kl().mean()


def projection(shape):
    return fill.input_tensor("projection", shape) / np.float32(np.prod(shape))


def gradients_torch(backend, case):
    import torch

    spec, video, noise = case
    vae = vaes.build(backend, spec)
    x = vae.tensor(video).requires_grad_()
    out, posterior = vae.model(x, vae.tensor(noise))
    parameters = {n: p for n, p in vae.model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        objective(out, posterior, vae.tensor(projection(tuple(out.shape)))), [x, *parameters.values()]
    )
    return {name: vae.array(g) for name, g in zip(["input", *parameters], found, strict=True)}


def gradients_mindspore(case):
    import mindspore as ms

    spec, video, noise = case
    vae = vaes.build("mindspore", spec)
    noise = vae.tensor(noise)
    frames = spec.video_size(*noise.shape[2:])
    weight = vae.tensor(projection((video.shape[0], 3, *frames)))

    def loss(x):
        out, posterior = vae.model(x, noise)
        return objective(out, posterior, weight)

    parameters = vae.model.trainable_params()
    input_gradient, found = ms.grad(loss, 0, parameters)(vae.tensor(video))
    names = [p.name for p in parameters]
    return {"input": vae.array(input_gradient)} | {n: vae.array(g) for n, g in zip(names, found, strict=True)}


def test_every_gradient(case):
    truth, own = gradients_torch("truth", case), gradients_torch("torch", case)
    found = gradients_mindspore(case)
    assert set(found) == set(truth), "trained parameters differ"
    assert not set(found) & case[0].optional(), "a Haar filter is trained"
    allowance = vaes.Allowance()
    for name in [*reversed(list(truth)[1:]), "input"]:  # errors travel backwards
        worst, allowed = np.abs(found[name] - truth[name]).max(), allowance(truth[name], own[name])
        assert worst <= allowed, f"{name}: {worst:.2e} from float64, allowed {allowed:.2e}"


@pytest.mark.parametrize(
    "dtype, plan",
    [("fp16", None), ("bf16", Tiling("exact", tile_size=16, tile_overlap=8))],
    ids=["fp16", "bf16, chunks and tiles"],
)
def test_half_types(case, dtype, plan):
    """Weights and activations in half types, kernels inside in float32: both backends err alike."""
    spec, video, noise = case
    results = []
    for backend, kind in (("truth", "fp32"), ("torch", dtype), ("mindspore", dtype)):
        vae = vaes.build(backend, spec, dtype=kind)
        with vae.no_grad():
            latents = vae.model.encode_scaled(vae.tensor(video), vae.tensor(noise), plan)
            assert latents.dtype == vae.dtype
            results.append((vae.array(latents), vae.array(vae.model.decode_scaled(latents, plan))))
    for exact, reference, found in zip(*results, strict=True):
        own, error = (float(np.sqrt(((a - exact) ** 2).mean())) for a in (reference, found))
        assert 0 < error <= 2 * own, f"rms {error:.2e} from float64, the reference's own {own:.2e}"


@pytest.mark.parametrize(
    "rows, stride, padding", [(32, 1, (0, 1, 1)), (33, 1, (1, 1, 1)), (63, 2, (0, 0, 1, 1, 0, 1)), (32, 1, (1, 1, 1))]
)
def test_conv3d_kernel(rows, stride, padding):
    """Values and gradients of both CPU forms: frames of 512 positions (32 x 16) go through 2-D convolutions."""
    import torch

    import osp_mindspore  # noqa: F401
    from osp_mindspore import kernels
    from osp_torch import kernels as reference

    import mindspore as ms

    shapes = ((2, 4, 4, rows, 16 * stride), (6, 4, 3, 3, 3), (6,))
    arrays = [fill.input_tensor(f"conv{i}", shape) for i, shape in enumerate(shapes)]
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [torch.from_numpy(a).to(dtype).requires_grad_() for a in arrays]
        out = reference.conv3d(*leaves, (stride,) * 3, padding)
        results.append([out, *torch.autograd.grad((out * out).sum(), leaves)])
    truth, own = ([t.detach().numpy() for t in r] for r in results)

    def loss(*leaves):
        out = kernels.conv3d(*leaves, (stride,) * 3, padding)
        return (out * out).sum(), out

    found, out = ms.grad(loss, (0, 1, 2), has_aux=True)(*(ms.Tensor(a) for a in arrays))
    for exact, reference_value, tensor in zip(truth, own, (out[0], *found), strict=True):
        assert tensor.shape == exact.shape
        assert np.abs(tensor.asnumpy() - exact).max() <= vaes.Allowance()(exact, reference_value)


@pytest.mark.parametrize("window", [(2, 2, 2), (1, 2, 2)])
def test_haar_kernels(window):
    """The Ascend forms (windows moved into channels, one product) equal the CPU forms, which equal torch."""
    import torch

    from osp_mindspore.kernels.haar import haar_ascend, haar_cpu, inverse_haar_ascend, inverse_haar_cpu
    from osp_torch import kernels as reference

    import mindspore as ms

    bands = int(np.prod(window))
    filters = fill.input_tensor("filters", (bands, *window))
    video = fill.input_tensor("video", (2, 3, 5, 7, 8))  # a frame (of windows of two) and a row are left over
    analysed = reference.haar(torch.from_numpy(video), torch.from_numpy(filters))
    synthesised = reference.inverse_haar(analysed, torch.from_numpy(filters)).numpy()
    analysed = analysed.numpy()
    for forward_form, inverse_form in ((haar_cpu, inverse_haar_cpu), (haar_ascend, inverse_haar_ascend)):
        found = forward_form(ms.Tensor(video), ms.Tensor(filters)).asnumpy()
        back = inverse_form(ms.Tensor(analysed), ms.Tensor(filters)).asnumpy()
        for a, b in ((found, analysed), (back, synthesised)):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= bands * vaes.UNIT * 4 * np.abs(b).max()  # products of one sum, reordered


def test_divergence_of_two_posteriors():
    """KL(p, q) of both backends against torch.distributions; KL(p, p) = 0."""
    import torch

    from osp_mindspore.wfvae import Posterior as MindSporePosterior
    from osp_torch.wfvae import Posterior

    from mindspore import Tensor

    def normal(moments):
        mean, logvar = torch.from_numpy(moments).double().chunk(2, 1)
        return torch.distributions.Normal(mean, (0.5 * logvar).exp())

    p, q = (fill.input_tensor(tag, (2, 6, 2, 3, 4)) for tag in "pq")
    exact, own = (
        Posterior(torch.from_numpy(p).to(t)).kl(Posterior(torch.from_numpy(q).to(t))).numpy()
        for t in (torch.float64, torch.float32)
    )
    expected = torch.distributions.kl_divergence(normal(p), normal(q)).sum((1, 2, 3)).numpy()
    assert exact.shape == (2, 4) and np.abs(exact - expected).max() <= 1e-12 * expected.max()
    found = MindSporePosterior(Tensor(p)).kl(MindSporePosterior(Tensor(q))).asnumpy()
    assert np.abs(found - exact).max() <= vaes.Allowance()(exact, own)
    assert not MindSporePosterior(Tensor(p)).kl(MindSporePosterior(Tensor(p))).asnumpy().any()


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_haar_filters_of_a_checkpoint_come_first(backend):
    """Twice the filters of the last synthesis give twice the video; a checkpoint without any gives the constants."""
    from importlib import import_module

    spec = WFVAESpec.from_config({**_NARROW, "norm_type": "layernorm"})
    package = f"osp_{backend}"
    build = import_module(f"{package}.checkpoint").build
    model_class = import_module(f"{package}.wfvae").WFVAEModel
    vae = vaes.build(backend, spec)
    constants = spec.constants()

    def read(name):
        last = name.startswith("decoder.inverse_wavelet_transform_out")
        return 2 * constants[name] if last else vaes.reader(spec)(name)

    latents = vae.tensor(fill.input_tensor("latent", (1, 8, 2, 2, 2)))
    with vae.no_grad():
        once = vae.array(vae.model.decode(latents))
        twice = vae.array(build(model_class, spec, read).decode(latents))
    assert np.array_equal(twice, 2 * once)


def test_graph_mode():
    """Encoder and decoder compile (on an Ascend the graph is the fast form) and compute what PyNative computes."""
    from mindspore import jit

    config = {**_NARROW, "norm_type": "layernorm", "t_interpolation": "trilinear", "encoder_num_resblocks": 1}
    spec = WFVAESpec.from_config({**config, "decoder_num_resblocks": 1})
    vae = vaes.build("mindspore", spec)
    truth = vaes.build("truth", spec)
    own = vaes.build("torch", spec)

    def encode(video):
        return vae.model.encoder(video)[0]

    def decode(latents):
        return vae.model.decoder(latents)[0]

    for function, half, shape in ((encode, "encoder", (1, 3, 5, 16, 16)), (decode, "decoder", (1, 8, 2, 2, 2))):
        x = fill.input_tensor("graph", shape)
        with truth.no_grad():
            exact, reference = (v.array(getattr(v.model, half)(v.tensor(x))[0]) for v in (truth, own))
        found = vae.array(jit(function)(vae.tensor(x)))
        assert np.abs(found - exact).max() <= vaes.Allowance()(exact, reference)
