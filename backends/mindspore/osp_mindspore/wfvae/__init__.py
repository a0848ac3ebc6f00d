"""WFVAE: modules.py the layers, model.py encoder and decoder, tiling.py chunks in time and tiles in space."""

from osp_mindspore.wfvae.model import Posterior, WFVAEModel

__all__ = ["Posterior", "WFVAEModel"]
