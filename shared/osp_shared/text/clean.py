r"""Caption cleaning of the training data, rule for rule in the original's order.

One of the family of cleaners that began with DeepFloyd IF. Inference does not clean. The rules are parity-bound:
captions must give the token ids that the released weights were trained on, so oddities stay (`&amp` leaves its
semicolon, "pdfs" leaves an "s", a leading blank blocks the last rules).
"""

from __future__ import annotations

import html
import re
import urllib.parse
import warnings

_SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"


def _address(scheme: str) -> str:
    with_scheme = scheme + r":(?:\/{1,3}|[a-zA-Z0-9%])"
    bare = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
    return rf"\b(?:{with_scheme}|{bare})"


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern, str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_BEFORE_HTML = _rules(
    ("<person>", "person"),
    (_address("https?"), ""),
    (_address("www"), ""),
)
_NAMES = _rules((r"@\w+\b", ""))
# strokes, phonetic and enclosed letters, compatibility forms, extension A, hexagrams
_RARE_CJK = _rules((r"[\u31C0-\u31EF\u31F0-\u31FF\u3200-\u32FF\u3300-\u33FF\u3400-\u4DBF\u4DC0-\u4DFF]+", ""))
_CHINESE = _rules((r"[\u4E00-\u9FFF]+", ""))
_DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0"
    r"\uFE31\uFE32\uFE58\uFE63\uFF0D]+"
)
BAD_PUNCTUATION = r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\/\*]+"
_SYMBOLS = _rules(
    (_DASHES, "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_SUFFIXES})", ""),  # file names
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (BAD_PUNCTUATION, " "),
    (r"\s+\.\s+", " "),
)
_JOINERS = re.compile(r"[-_]")
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_SUFFIXES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # 1920x1080
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _apply(rules: tuple[tuple[re.Pattern, str], ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def clean_caption(caption: str, keep_chinese: bool = True) -> str:
    """A caption in lower case without addresses, markup, file names, sizes, numbers of articles and rare signs.

    keep_chinese: False removes U+4E00 to U+9FFF, as the original does unless an encoder's name contains "mt5".
    """
    import ftfy

    text = _apply(_BEFORE_HTML, urllib.parse.unquote_plus(caption).strip().lower())
    text = _apply(_RARE_CJK, _apply(_NAMES, _without_markup(text)))
    text = _apply(_SYMBOLS, text if keep_chinese else _apply(_CHINESE, text))
    if len(_JOINERS.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_WORDS, text).strip()


def clean_dataset_caption(caption: str, keep_chinese: bool = True) -> str:
    """The caption as the original's training data sets clean it: inside a list of one, printed as Python prints it.

    Mostly the same; a caption that holds both kinds of quotes, an escape, or nothing comes out differently.
    """
    return clean_caption(str([caption]), keep_chinese)


def _without_markup(text: str) -> str:
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captions that look like file names or addresses
            return BeautifulSoup(text, features="html.parser").text
    except ParserRejectedMarkup:  # "<![": the original drops such captions with an exception
        return text
