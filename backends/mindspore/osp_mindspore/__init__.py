"""The MindSpore production implementation: Ascend first, and it runs on CPU."""

from osp_mindspore import runtime

runtime.start()
