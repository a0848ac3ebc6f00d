"""Checkpoints: every reader, writer, name table and fingerprint. Needs neither torch nor MindSpore."""

from osp_shared.checkpoints.checkpoint import Checkpoint, open_checkpoint
from osp_shared.checkpoints.convert import Report, convert
from osp_shared.checkpoints.plan import Options
from osp_shared.checkpoints.write import write_safetensors

__all__ = ["Checkpoint", "Options", "Report", "convert", "open_checkpoint", "write_safetensors"]
