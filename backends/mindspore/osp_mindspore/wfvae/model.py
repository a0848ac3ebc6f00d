"""WFVAE: a causal video autoencoder with a wavelet path for the low frequencies (WF-VAE, Li et al. 2024).

Shapes: B batch, C channels, T frames, H W rows and columns; video in [-1, 1]; z latent channels.
Attribute paths are the released state dict's names, in its order.
"""

from __future__ import annotations

import math

import numpy as np

from osp_mindspore import kernels
from osp_mindspore.kernels.precision import HALF
from osp_mindspore.wfvae import modules, tiling
from osp_mindspore.wfvae.modules import (
    AttnBlock3DFix,
    CausalConv3d,
    FrameConv2d,
    ResnetBlock2D,
    ResnetBlock3D,
    Stack,
    normalize,
)
from osp_shared.geometry.chunks import Tiling
from osp_shared.specs.wfvae import WFVAESpec

from mindspore import Tensor, float32, nn, ops


def add_low_band(coefficients_BCTHW, low_B3THW):
    """The reconstructed next level is added to the low band: the first three channels."""
    return ops.cat([coefficients_BCTHW[:, :3] + low_B3THW, coefficients_BCTHW[:, 3:]], 1)


class Encoder(nn.Cell):
    def __init__(self, spec: WFVAESpec):
        super().__init__()
        b, e = spec.base_channels, spec.encoder_energy_flow_hidden_size
        norm = {"norm_type": spec.norm_type, "dropout": spec.dropout}
        self.down1 = Stack(
            [FrameConv2d(24, b, 3, padding=1)]
            + [ResnetBlock2D(b, **norm) for _ in range(spec.encoder_num_resblocks)]
            + [getattr(modules, spec.l1_dowmsample_block)(b)]
        )
        self.down2 = Stack(
            [FrameConv2d(b + e, 2 * b, 3, padding=1)]
            + [ResnetBlock3D(2 * b, 2 * b, **norm) for _ in range(spec.encoder_num_resblocks)]
            + [getattr(modules, spec.l2_dowmsample_block)(2 * b)]
        )
        self.connect_l1 = FrameConv2d(spec.level1_channels, e, 3, padding=1)
        self.connect_l2 = FrameConv2d(24, e, 3, padding=1)
        attention = [AttnBlock3DFix(4 * b, spec.norm_type)] if spec.use_attention else []
        self.mid = Stack([ResnetBlock3D(2 * b + e, 4 * b, **norm), *attention, ResnetBlock3D(4 * b, 4 * b, **norm)])
        self.norm_out = normalize(4 * b, spec.norm_type)
        self.conv_out = CausalConv3d(4 * b, 2 * spec.latent_dim, 3, padding=1)
        self.wavelet_transform_in = modules.HaarWaveletTransform3D()
        self.wavelet_transform_l1 = getattr(modules, spec.l1_downsample_wavelet)()
        self.wavelet_transform_l2 = getattr(modules, spec.l2_downsample_wavelet)()

    def construct(self, video_B3THW, cache=None):
        """Moments (B, 2 z, T', H // 8, W // 8) and the wavelet coefficients of levels 1 and 2."""
        c0 = self.wavelet_transform_in(video_B3THW, cache)
        c1 = self.wavelet_transform_l1(c0[:, :3], cache)
        flow1 = self.connect_l1(c1)
        c2 = self.wavelet_transform_l2(c1[:, :3], cache)
        flow2 = self.connect_l2(c2)
        h = ops.cat([self.down1(c0, cache), flow1], 1)
        h = ops.cat([self.down2(h, cache), flow2], 1)
        h = self.mid(h, cache)
        return self.conv_out(kernels.silu(self.norm_out(h)), cache), (c1, c2)


class Decoder(nn.Cell):
    def __init__(self, spec: WFVAESpec):
        super().__init__()
        b, d = spec.base_channels, spec.decoder_energy_flow_hidden_size
        norm = {"norm_type": spec.norm_type, "dropout": spec.dropout}
        blocks, links = spec.decoder_num_resblocks, spec.connect_res_layer_num
        self.width = 4 * b
        self.conv_in = CausalConv3d(spec.latent_dim, 4 * b, 3, padding=1)
        attention = [AttnBlock3DFix(4 * b, spec.norm_type)] if spec.use_attention else []
        self.mid = Stack([ResnetBlock3D(4 * b, 4 * b, **norm), *attention, ResnetBlock3D(4 * b, 4 * b + d, **norm)])
        self.up2 = Stack(
            [ResnetBlock3D(4 * b, 4 * b, **norm) for _ in range(blocks)]
            + [getattr(modules, spec.l2_upsample_block)(4 * b, spec.t_interpolation)]
            + [ResnetBlock3D(4 * b, 4 * b + d, **norm)]
        )
        self.up1 = Stack(
            [ResnetBlock3D(2 * b if i else 4 * b, 2 * b, **norm) for i in range(blocks)]
            + [getattr(modules, spec.l1_upsample_block)(2 * b)]
            + [ResnetBlock3D(2 * b, 2 * b, **norm)]
        )
        self.layer = Stack([ResnetBlock3D(2 * b, b, **norm), ResnetBlock3D(b, b, **norm)])
        self.connect_l1 = Stack(
            [ResnetBlock3D(d, d, **norm) for _ in range(links)] + [FrameConv2d(d, spec.level1_channels, 3, padding=1)]
        )
        self.connect_l2 = Stack(
            [ResnetBlock3D(d, d, **norm) for _ in range(links)] + [FrameConv2d(d, 24, 3, padding=1)]
        )
        self.norm_out = normalize(b, spec.norm_type)
        self.conv_out = FrameConv2d(b, 24, 3, padding=1)
        self.inverse_wavelet_transform_out = modules.InverseHaarWaveletTransform3D()
        self.inverse_wavelet_transform_l1 = getattr(modules, spec.l1_upsample_wavelet)()
        self.inverse_wavelet_transform_l2 = getattr(modules, spec.l2_upsample_wavelet)()

    def construct(self, latents_BCTHW, cache=None):
        """Video (B, 3, T', 8 H, 8 W), not clamped, and the wavelet coefficients of levels 1 and 2."""
        h = self.mid(self.conv_in(latents_BCTHW, cache), cache)
        c2 = self.connect_l2(h[:, self.width :], cache)  # the energy flow is the last channels
        w2 = self.inverse_wavelet_transform_l2(c2, cache)
        h = self.up2(h[:, : self.width], cache)
        c1 = self.connect_l1(h[:, self.width :], cache)
        if cache is not None:
            w2 = cache.align("w2", w2, c1.shape[2])
        c1 = add_low_band(c1, w2)
        w1 = self.inverse_wavelet_transform_l1(c1, cache)
        h = self.layer(self.up1(h[:, : self.width], cache), cache)
        c0 = self.conv_out(kernels.silu(self.norm_out(h)))
        if cache is not None:
            w1 = cache.align("w1", w1, c0.shape[2])
        return self.inverse_wavelet_transform_out(add_low_band(c0, w1), cache), (c1, c2)


class Posterior:
    """Diagonal Gaussian of moments (B, 2 z, T, H, W): mean, then log-variance, clamped to [-30, 20] for every use.

    Held in float32 for half types; `mode` and `sample` round back to the moments' dtype.
    """

    def __init__(self, moments_BCTHW):
        self.dtype = moments_BCTHW.dtype
        moments_BCTHW = moments_BCTHW.astype(float32) if self.dtype in HALF else moments_BCTHW
        self.mean, logvar = ops.chunk(moments_BCTHW, 2, 1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = kernels.exp(0.5 * self.logvar)
        self.var = kernels.exp(self.logvar)

    def mode(self):
        return self.mean.astype(self.dtype)

    def sample(self, noise):
        """noise: standard normal, shaped like the mean."""
        return (self.mean + self.std * noise).astype(self.dtype)

    def kl(self, other: Posterior | None = None):
        """KL divergence to `other`, or to the standard normal, summed over (C, T, H) alone: (B, W)."""
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            distance = (self.mean - other.mean) ** 2
            terms = distance / other.var + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum((1, 2, 3))

    def nll(self, x):
        """Negative log-likelihood of x, summed over (C, T, H) alone: (B, W)."""
        terms = math.log(2.0 * math.pi) + self.logvar + (x - self.mean) ** 2 / self.var
        return 0.5 * terms.sum((1, 2, 3))


class WFVAEModel(nn.Cell):
    """The autoencoder of `spec`.

    Raises:
        OspError: from encode and decode, an input of another shape than the config's, or chunks that cannot be run.
    """

    def __init__(self, spec: WFVAESpec):
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)

    def encode(self, video_B3THW, plan: Tiling | None = None) -> Posterior:
        """Posterior over latents (B, z, (T - 1) // stride + 1, H // 8, W // 8)."""
        self.spec.check_video(tuple(video_B3THW.shape))
        return Posterior(self.encoder(video_B3THW)[0] if plan is None else tiling.encode(self, video_B3THW, plan))

    def decode(self, latents_BCTHW, plan: Tiling | None = None):
        """Video (B, 3, stride (T - 1) + 1, 8 H, 8 W), not clamped."""
        self.spec.check_latents(tuple(latents_BCTHW.shape))
        return self.decoder(latents_BCTHW)[0] if plan is None else tiling.decode(self, latents_BCTHW, plan)

    def construct(self, video_B3THW, noise=None):
        """(reconstruction, posterior): of the posterior's mode, or of its sample with `noise`."""
        posterior = self.encode(video_B3THW)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode(latents), posterior

    def encode_scaled(self, video_B3THW, noise=None, plan: Tiling | None = None):
        """(latents - shift) * scale, what the diffusion model sees."""
        posterior = self.encode(video_B3THW, plan)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        scale, shift = self.scale_and_shift(latents)
        return (latents - shift) * scale

    def decode_scaled(self, latents_BCTHW, plan: Tiling | None = None):
        """Video of scaled latents."""
        scale, shift = self.scale_and_shift(latents_BCTHW)
        return self.decode(latents_BCTHW / scale + shift, plan)

    def scale_and_shift(self, like):
        """Both (1, z, 1, 1, 1), float32 numbers cast to the latents' dtype."""
        lists = (np.float32(values) for values in self.spec.scale_and_shift())
        return [Tensor(v).astype(like.dtype).reshape(1, -1, 1, 1, 1) for v in lists]

    def get_last_layer(self):
        """The weight whose gradients balance the adversarial loss."""
        return self.decoder.conv_out.weight
