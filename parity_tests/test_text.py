"""Text before the encoder: cleaning and templates against the golden files, prompt files, the real mT5 tokens."""

import json
import logging
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import golden_files
from osp_shared.errors import OspError
from osp_shared.text import templates
from osp_shared.text.clean import BAD_PUNCTUATION, clean_caption, clean_dataset_caption
from osp_shared.text.prompts import read_prompts
from osp_shared.text.tokenizer import Tokenizer
from osp_tools import assets

# ------------------------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("content,row", golden_files.items("text", "cleaning", lambda row: repr(row[0])[:24]))
def test_golden_cleaning(content, row):
    caption, with_chinese, without = row
    assert clean_caption(caption) == with_chinese
    assert clean_caption(caption, keep_chinese=False) == without


@pytest.mark.parametrize("content,row", golden_files.items("text", "list_inputs", lambda row: repr(row[0])[:24]))
def test_golden_list_inputs(content, row):
    captions, cleaned = row
    assert clean_caption(str(captions)) == cleaned
    if len(captions) == 1:
        assert clean_dataset_caption(captions[0]) == cleaned


@pytest.mark.parametrize("path", golden_files.files("text", "templates"), ids=lambda p: p.stem)
def test_golden_templates(path):
    assert golden_files.load(path)["templates"] == {
        "positive_prompt": templates.POSITIVE_PROMPT,
        "negative_prompt": templates.NEGATIVE_PROMPT,
        "sampling_refiner_template": templates.SAMPLING_REFINER_TEMPLATE,
        "standalone_refiner_template": templates.REFINER_TEMPLATE,
        "refiner_system": templates.REFINER_SYSTEM,
    }


@pytest.mark.parametrize("path", golden_files.files("text", "bad_punct_chars"), ids=lambda p: p.stem)
def test_golden_bad_punctuation(path):
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert "".join(re.findall(BAD_PUNCTUATION, every)) == golden_files.load(path)["bad_punct_chars"]


def test_golden_files_are_there():
    for section in ("cleaning", "list_inputs", "templates", "bad_punct_chars"):
        assert golden_files.files("text", section), section


# ---------------------------------------------------------------------------------------------------------- cleaning

PIECES = ["&amp;", "<b>", "</", "<!", "<![", "http://", "www.a.com", ".jpg", "#12", "1920x1080", "'", '"', "\\n", "%41",
          "-", "_", "..", "中", "㐀", "click on", "free download", "a1b2", "&lt;", " . ", "@x", "\ud7ff"]  # fmt: skip
PIECE = st.one_of(st.sampled_from(PIECES), st.text(max_size=6), st.text("ab1 .,-'\"", max_size=6))
CAPTION = st.lists(PIECE, max_size=12)


@settings(max_examples=200, deadline=None)
@given(CAPTION.map("".join), st.booleans())
@example("<![", True)
@example("<![CDATA[", True)
@example("&#x110000;&#xD800;", True)
@example("Å\x80¢", False)
def test_cleaner_never_raises_and_keeps_its_promises(caption, keep_chinese):
    got = clean_caption(caption, keep_chinese)
    assert isinstance(got, str)
    assert got == got.strip()
    assert not re.search(r"\s\s|[\t\n]", got)
    # Entities, percent signs, mojibake and compatibility ideographs become Chinese after Chinese was taken out, in the
    # original as well.
    plain = all(c.isascii() or "\u2e80" <= c < "\uf900" for c in caption) and not set("&%") & set(caption)
    if not keep_chinese and plain:
        assert not re.search(r"[\u4E00-\u9FFF]", got)
    assert clean_dataset_caption(caption, keep_chinese) == clean_caption(str([caption]), keep_chinese)


WORD = st.from_regex(r"[b-z]{2,8}", fullmatch=True).filter(
    lambda word: not re.search("shipping|download|click|page|png|jpg|jpeg|bmp|webp|eps|pdf|apk", word)
)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORD, min_size=1, max_size=12))
def test_plain_captions_are_left_alone_and_stay_so(words):
    """Idempotence holds for plain text only: the rules were never a normal form ("pdf images" loses more each time)."""
    caption = " ".join(words) + "."
    assert clean_caption(caption.upper()) == caption
    assert clean_caption(clean_caption(caption)) == caption


# --------------------------------------------------------------------------------------------- templates and prompts


def test_templates_take_any_prompt():
    assert templates.positive("a {cat} {}") == "\n    high quality, high aesthetic, a {cat} {}\n    "
    system, user = templates.refiner_messages("{x}", templates.REFINER_TEMPLATE)
    assert system == {"role": "system", "content": templates.REFINER_SYSTEM}
    assert user["role"] == "user" and user["content"].startswith('Refine the sentence: "{x}" to contain')


def test_prompts_of_the_command_line_and_of_files(tmp_path):
    assert read_prompts(["a cat", "b.txt"]) == ["a cat", "b.txt"]
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeff  a cat \n\n猫\r\nlast", encoding="utf-8")
    assert read_prompts([str(text)]) == ["a cat", "", "猫", "last"]
    table = tmp_path / "prompts.csv"
    table.write_text('path,cap\na.mp4,"one, two"\nb.mp4,"x ""y"""\nc.mp4\n', encoding="utf-8")
    assert read_prompts([str(table)]) == ["one, two", 'x "y"', ""]


@pytest.mark.parametrize(
    "name,content,expected",
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b"\n  \n\n", "holds no prompt"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("empty.csv", b"", "no column"),
        ("head.csv", b"path,cap\n", "holds no prompt"),
        ("other.csv", b"path,prompt\na,b\n", "columns are path, prompt"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OspError, match=expected) as error:
        read_prompts([str(tmp_path / name)])
    assert name in str(error.value) and "\n" not in str(error.value)


def test_no_prompt_at_all(tmp_path):
    with pytest.raises(OspError, match="no prompt"):
        read_prompts([])
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(OspError, match="cannot be read"):
        read_prompts([str(tmp_path / "folder.txt")])


# -------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="session")
def vocabulary():
    """Folder with the real mT5 vocabulary, fetched once."""
    return assets.fetch("mt5_tokenizer")


@pytest.fixture(scope="session")
def tokenizer(vocabulary):
    return Tokenizer.load(vocabulary)


CHINESE = "一只猫在草地上奔跑"
PROMPTS = ["a cat", templates.positive("A cat running on the beach."), templates.NEGATIVE_PROMPT, "", CHINESE]


def sentencepiece_ids(vocabulary, text: str) -> list[int]:
    """The library under the tokenizer, asked directly; 1 ends the text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "spiece.model"))
    return processor.encode(text) + [1]


def test_tokens_are_the_vocabularys(tokenizer, vocabulary):
    ids_BL, mask_BL = tokenizer(PROMPTS, 128)
    assert ids_BL.shape == mask_BL.shape == (5, 128)
    assert ids_BL.dtype == mask_BL.dtype == np.int64
    assert tokenizer.vocabulary_size == 250100
    for prompt, ids, mask in zip(PROMPTS, ids_BL, mask_BL, strict=True):
        want = sentencepiece_ids(vocabulary, prompt)
        assert ids[: len(want)].tolist() == want
        assert (ids[len(want) :] == 0).all()
        assert mask.tolist() == [1] * len(want) + [0] * (128 - len(want))


def test_truncation_is_told(tokenizer, vocabulary, caplog):
    prompt = "one two three " * 20 + "the very end"
    whole = sentencepiece_ids(vocabulary, prompt)
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer(["short", prompt], len(whole) - 3)
    assert ids[1].tolist() == whole[:-4] + [1]
    assert mask[1].all()
    (record,) = caplog.records
    message = record.getMessage()
    assert "prompt 1" in message and str(len(whole)) in message and "very end" in message
    caplog.clear()
    tokenizer([prompt], len(whole))
    assert not caplog.records


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A sentencepiece vocabulary of a few pieces: the real one takes seconds to load, and its size is not the point."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "text.txt").write_text("\n".join(PROMPTS * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece"), vocab_size=120, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return folder / "spiece.model"


def test_bare_vocabulary_and_full_folders_agree(small_model, tmp_path):
    """spiece.model alone, under a name that says nothing; a named class; the released layout with a subfolder."""
    bare, named, nested = (tmp_path / name for name in ("bare", "named", "nested"))
    for folder in (bare, named, nested / "tokenizer"):
        folder.mkdir(parents=True)
        os.symlink(small_model, folder / "spiece.model")
    (named / "config.json").write_text(json.dumps({"model_type": "mt5"}))
    (named / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    loaded = [Tokenizer.load(folder) for folder in (bare, named, nested)]
    want = sentencepiece_ids(small_model.parent, PROMPTS[1])
    for one in loaded:
        assert one.vocabulary_size == loaded[0].vocabulary_size
        ids_BL, mask_BL = one(PROMPTS, 256)
        np.testing.assert_array_equal(ids_BL, loaded[0](PROMPTS, 256)[0])
        assert ids_BL[1][: mask_BL[1].sum()].tolist() == want


def test_bad_tokenizer_folders(small_model, tmp_path):
    with pytest.raises(OspError, match="does not exist"):
        Tokenizer.load("google/mt5-xxl")  # a name is not looked up anywhere
    with pytest.raises(OspError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(OspError, match="cannot be loaded") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OspError, match="not valid JSON"):
        Tokenizer.load(tmp_path)
    tokenizer = Tokenizer.load(small_model.parent)
    for prompts, length in (([], 8), (["x"], 1)):
        with pytest.raises(OspError, match="at least 1 prompt and 2 tokens"):
            tokenizer(prompts, length)


def test_loading_never_reaches_for_the_network(small_model):
    """A process in which every connection is an error."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from osp_shared.text.tokenizer import Tokenizer\n"
        "print(Tokenizer.load(sys.argv[1])(['a cat'], 8)[0].tolist())\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"USE_TORCH": "0"}  # tokens need no framework, and the import is slow
    command = [sys.executable, "-c", code, str(small_model.parent)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")
    assert "PyTorch" not in done.stderr  # no advice to install one either
