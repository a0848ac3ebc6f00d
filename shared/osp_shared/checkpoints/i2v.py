"""An image-to-video model that starts where a text-to-video model is.

The two patch embeddings of the inpaint model end in linear layers that start at zero, so the new model's output is the
old one's. Of the embeddings, the one for masked latents copies the T2V patch embedding; the one for the mask is random
(the default of torch's Conv2d: uniform within 1 / sqrt(fan in)), from a fixed seed here.
"""

from __future__ import annotations

import math

import numpy as np

from osp_shared import fill
from osp_shared.checkpoints import dtypes
from osp_shared.checkpoints.checkpoint import Checkpoint
from osp_shared.checkpoints.extent import Extent
from osp_shared.errors import OspError
from osp_shared.specs.dit import RANDOM, ZEROS, DiTSpec, InpaintSpec, t2v_to_i2v


def start_from_t2v(source: Checkpoint) -> Checkpoint:
    """Turn an open T2V checkpoint into an inpaint one, in place: four tensors and two zero matrices are added.

    Raises OspError unless it is a T2V checkpoint.
    """
    if source.kind != "dit":
        raise OspError(f"{source.path}: image-to-video training starts from a text-to-video checkpoint")
    spec: DiTSpec = source.spec()
    target = InpaintSpec.from_config({k: v for k, v in spec.to_config().items() if not k.startswith("_")})
    need, dtype = target.parameters(), source.dtypes["pos_embed.proj.weight"]
    for name, shape in need.items():
        origin = t2v_to_i2v(name)
        if origin == ZEROS:
            source.add(name, Extent(dtype, shape, ()))
        elif origin == RANDOM:
            bound = 1.0 / math.sqrt(math.prod(need[f"{name.rpartition('.')[0]}.weight"][1:]))
            values = fill.rng(name).uniform(-bound, bound, shape)
            source.add(name, values.astype(np.float32).astype(dtypes.NUMPY[dtype]))
        elif origin != name:
            source.add(name, source.extents[origin])
    source.kind, source.config = "inpaint", {**(source.config or {}), **target.to_config()}
    source.notes.append("image-to-video stem added: zero linear layers, the T2V patch embedding for masked latents")
    return source
