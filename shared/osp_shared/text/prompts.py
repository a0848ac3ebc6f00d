"""Where prompts come from: the command line, a text file, a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from osp_shared.errors import OspError

PROMPT_COLUMN = "cap"


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts of `--text_prompt`: the arguments themselves, or the content of one .txt or .csv file.

    A .txt file is one prompt a line, stripped; an empty line is an empty prompt and keeps its number. A .csv file
    has its prompts in the column "cap". A file without any text is an error.
    """
    if not arguments:
        raise OspError("no prompt: give one or more prompts, or one .txt (a prompt a line) or .csv (column cap) file")
    suffix = Path(arguments[0]).suffix.lower() if len(arguments) == 1 else ""
    if suffix not in (".txt", ".csv"):
        return list(arguments)
    path = Path(arguments[0])
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            prompts = _column(file, path) if suffix == ".csv" else [line.strip() for line in file]
    except FileNotFoundError:
        raise OspError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise OspError(f"prompt file {path} is not UTF-8 text (byte {error.start})") from None
    except (OSError, csv.Error) as error:
        raise OspError(f"prompt file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not any(prompts):
        raise OspError(f"prompt file {path} holds no prompt: it must have at least one line of text")
    return prompts


def _column(file, path: Path) -> list[str]:
    rows = csv.DictReader(file)
    if PROMPT_COLUMN not in (rows.fieldnames or []):
        columns = ", ".join(rows.fieldnames or ["none"])
        raise OspError(f'prompt file {path} has no column "{PROMPT_COLUMN}": its columns are {columns}')
    return [(row[PROMPT_COLUMN] or "").strip() for row in rows]
