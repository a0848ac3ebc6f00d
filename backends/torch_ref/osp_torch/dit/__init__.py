"""Skiparse diffusion transformer: modules.py the layers, model.py the text-to-video and the inpaint model."""

from osp_torch.dit.model import DiT, InpaintDiT, model_class

__all__ = ["DiT", "InpaintDiT", "model_class"]
