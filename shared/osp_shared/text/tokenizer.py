"""Tokens of the text encoders, through transformers, from a local folder. Nothing here ever touches the network.

Shapes: B prompts, L = max_length tokens.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError

VOCABULARY_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
MAX_LENGTH = 512

log = logging.getLogger(__name__)


class Tokenizer:
    """Prompts to padded token ids. `inner` is the transformers tokenizer."""

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From a text encoder's folder, its `tokenizer` subfolder, or a folder that holds only `spiece.model`."""
        place = _vocabulary_folder(Path(folder))
        # Read once at import: no request for updates, and no advice to install a framework.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the conversion of spiece.model drops byte fallback; so did training
                if _names_its_class(place):
                    inner = transformers.AutoTokenizer.from_pretrained(str(place), local_files_only=True)
                else:
                    known = _read_json(place / "tokenizer_config.json")
                    extra = {} if "extra_ids" in known else {"extra_ids": 0}
                    inner = transformers.T5TokenizerFast.from_pretrained(str(place), local_files_only=True, **extra)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OspError(f"tokenizer in {place} cannot be loaded: {reason[:200]}") from None
        return cls(inner)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids; an encoder's embedding table has at least as many rows."""
        return len(self.inner)

    def __call__(self, prompts: Sequence[str], max_length: int = MAX_LENGTH) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL and mask_BL (1 text and end mark, 0 padding), int64. What does not fit is cut, with a warning."""
        prompts = list(prompts)
        if max_length < 2 or not prompts:
            raise OspError(f"{len(prompts)} prompts at max_length {max_length}: at least 1 prompt and 2 tokens needed")
        full = self.inner(prompts, verbose=False)["input_ids"]
        for number, ids in enumerate(full):
            if len(ids) > max_length:
                cut = self.inner.decode(ids[max_length - 1 : -1])
                message = "prompt %d has %d tokens, the encoder takes %d; its end was cut off: %r"
                log.warning(message, number, len(ids), max_length, cut if len(cut) <= 300 else cut[:300] + " ...")
        batch = self.inner(
            prompts, padding="max_length", max_length=max_length, truncation=True, return_attention_mask=True
        )
        return np.asarray(batch["input_ids"], np.int64), np.asarray(batch["attention_mask"], np.int64)


def _vocabulary_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise OspError(f"text encoder folder {folder} does not exist: give a local folder that holds spiece.model")
    for place in (folder, folder / "tokenizer"):
        if any((place / name).is_file() for name in VOCABULARY_FILES):
            return place
    raise OspError(f"{folder} holds no tokenizer: expected one of {', '.join(VOCABULARY_FILES)} there or in tokenizer/")


def _names_its_class(folder: Path) -> bool:
    """Whether the files say which tokenizer this is; without, AutoTokenizer would guess from the folder's name."""
    config = _read_json(folder / "config.json")
    named = _read_json(folder / "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    return bool(named or config.get("model_type")) or not (folder / "spiece.model").is_file()


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OspError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
