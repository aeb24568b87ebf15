"""Texts as found: bytes of unknown encoding, and characters that no model or file format accepts."""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE

_BOMS = {
    BOM_UTF8: "utf-8",
    BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    BOM_UTF32_BE: "utf-32-be",
    BOM_UTF16_LE: "utf-16-le",
    BOM_UTF16_BE: "utf-16-be",
}

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_UNUSABLE = re.compile("[\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff\U000f0000-\U0010ffff]")


def decode(raw: bytes) -> tuple[str, str]:
    """Decode a text and return it with the name of its encoding.

    The first of these that fits: a byte order mark (UTF-8, UTF-16, UTF-32); UTF-16 without one, where every second byte
    is zero; strict UTF-8; UTF-8 that ends within a character; strict GB18030, if most of its characters are common
    ones; Windows-1252; and, for bytes that are undefined there, Latin-1. Some texts of MVSA were saved as GB18030, in
    which only quotes, dashes and emoji differ from ASCII.
    """
    for mark, encoding in _BOMS.items():
        if raw.startswith(mark) and (text := _strict(raw[len(mark) :], encoding)) is not None:
            return text, encoding
    if (wide := _unmarked_utf16(raw)) and (text := _strict(raw, wide)) is not None:
        return text, wide
    if (text := _strict(raw, "utf-8")) is not None:
        return text, "utf-8"
    if (text := _cut_utf8(raw)) is not None:
        return text, "cut utf-8"
    for encoding in ("gb18030", "cp1252"):
        text = _strict(raw, encoding)
        if text is not None and (encoding != "gb18030" or _is_plausible_gb18030(text)):
            return text, encoding
    return raw.decode("latin-1"), "latin-1"


def decode_lines(raw: bytes) -> list[tuple[str, str]]:
    """Decode the lines of a file and return each with the name of its encoding; line ends are removed.

    The file has one encoding if all of it is UTF-8, UTF-16 or GB18030. Otherwise, each line is decoded by itself, so
    that a line in another encoding does not affect the others.
    """
    text, encoding = decode(raw)
    wide = encoding.startswith("utf-16") and b"\n" in raw and "\n" not in text  # two marked bytes before a line
    if wide or encoding in ("cp1252", "latin-1"):
        return [decode(line.rstrip(b"\r")) for line in raw.removeprefix(BOM_UTF8).split(b"\n")]
    return [(line.rstrip("\r"), encoding) for line in text.split("\n")]


def clean(text: str) -> str:
    """Replace control characters except tab and line ends by a space, and lone surrogates, private-use characters and
    noncharacters by U+FFFD."""
    return _UNUSABLE.sub("\ufffd", _CONTROL.sub(" ", text))


def _strict(raw: bytes, encoding: str) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _cut_utf8(raw: bytes) -> str | None:
    """UTF-8 that is invalid only because it ends within a character, after another one of several bytes."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        head = raw[: error.start].decode()
        if error.reason == "unexpected end of data" and not head.isascii():
            return f"{head}\ufffd"
    return None


def _unmarked_utf16(raw: bytes) -> str | None:
    """UTF-16's byte order if at least three quarters of the bytes at one parity are zero, and none at the other."""
    low, high = raw[1::2], raw[::2]  # the zero bytes of ASCII characters, little-endian and big-endian
    for zeros, others, encoding in ((low, high, "utf-16-le"), (high, low, "utf-16-be")):
        if len(raw) >= 4 and len(raw) % 2 == 0 and 4 * zeros.count(0) >= 3 * len(zeros) and not others.count(0):
            return encoding
    return None


def _is_plausible_gb18030(text: str) -> bool:
    """Whether more than half of the characters beyond ASCII are common in GB18030 texts.

    Text in Windows-1252 often is valid GB18030 as well: an accented letter and the character after it become one rare
    character. Common are punctuation and letters (lead bytes A1 to A9), the 3,755 hanzi of level 1 (B0 to D7), and
    characters of four bytes, such as emoji; not a pair of equal bytes, which rather is a doubled letter or sign, and
    not a single hanzi next to a Latin letter. A run of four or more with three or more lead bytes is common whatever
    its characters are (traditional Chinese).
    """
    common = others = 0
    for run in re.finditer(r"[^\x00-\x7f]+", text):
        neighbours = text[max(run.start() - 1, 0) : run.start()] + text[run.end() : run.end() + 1]
        alone = len(run[0]) == 1 and any(character.isalpha() for character in neighbours)
        codes = [(character, character.encode("gb18030")) for character in run[0]]
        long = len(codes) >= 4 and len({code[0] for _, code in codes}) >= 3
        for character, code in codes:
            if len(code) == 2 and not long:
                symbol, hanzi = 0xA1 <= code[0] <= 0xA9, 0xB0 <= code[0] <= 0xD7 and not alone
                usual = (symbol or hanzi) and code[1] >= 0xA1 and code[0] != code[1]
            else:
                usual = _UNUSABLE.match(character) is None
            common, others = common + usual, others + (not usual)
    return common > others
