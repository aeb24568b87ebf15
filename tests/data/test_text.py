"""Texts in encodings other than UTF-8, and characters that no model accepts."""

import pytest

from distill.data.text import clean, decode, decode_lines


@pytest.mark.parametrize(
    ("raw", "text", "encoding"),
    [
        (bytes.fromhex("bdf1 ccec d5e6 bfaa d0c4 2c c5f3 d3d1 b6bc c0b4 c1cb"), "今天真开心,朋友都来了", "gb18030"),
        (b"caf\xe9 \x93tr\xe8s\x94 bon \x96 d\xe9j\xe0 vu", "café “très” bon – déjà vu", "cp1252"),
        (b"plain", "plain", "utf-8"),
        (b"", "", "utf-8"),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "café", "utf-8"),
        ("zwölf 😀".encode("utf-16"), "zwölf 😀", "utf-16-le"),
        (b"\xfe\xff" + "zwölf".encode("utf-16-be"), "zwölf", "utf-16-be"),
        ("no mark here".encode("utf-16-le"), "no mark here", "utf-16-le"),
        ("no mark here".encode("utf-16-be"), "no mark here", "utf-16-be"),
        (b"caf\xe9 \x81", "café \x81", "latin-1"),
        (b"a\x00b", "a\x00b", "utf-8"),
        ("zwölf".encode("utf-32"), "zwölf", "utf-32-le"),
        (b"\x00\x00\xfe\xff" + "zwölf".encode("utf-32-be"), "zwölf", "utf-32-be"),
        ("今天真开心".encode()[:-1], "今天真开\ufffd", "cut utf-8"),
        ("今天 😀".encode()[:-3], "今天 \ufffd", "cut utf-8"),
        (b"caf\xc3", "cafÃ", "cp1252"),
    ],
)  # fmt: skip
def test_an_encoding_is_found_in_a_strict_order(raw: bytes, text: str, encoding: str) -> None:
    assert decode(raw) == (text, encoding)


@pytest.mark.parametrize(
    "text",
    [
        "don’t stop… “wow”", "café 💩 ok", "❤ love", "我爱Python", "这是一个测试，谢谢！", "iPhone真好用", "好",
        "囧 今天", "テスト です", "繁體中文測試", "今天 €5",
    ],
)  # fmt: skip
def test_gb18030_is_recognised(text: str) -> None:
    assert decode(text.encode("gb18030")) == (text, "gb18030")


@pytest.mark.parametrize(
    "text",
    [
        "créée", "dégénérée", "naïve", "Größe", "grüße", "Müßiggang", "coração", "RÉÉDITION", "££5", "££", "¡¡Hola!!",
        "it’s", "“Hi”", "wait…what", "blåøjet", "yöä", "déçu", "ÉTÉ", "25ºC", "100€", "«Bonjour»", "¿Qué?", "’’", "——",
        "garçon à l’été",
    ],
)  # fmt: skip
def test_western_texts_are_not_read_as_chinese(text: str) -> None:
    assert decode(text.encode("cp1252")) == (text, "cp1252")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("今日はとても楽しかった", "shift-jis"), ("今日はとても楽しかった", "euc-jp"), ("今天真開心，朋友都來了", "big5"),
     ("Отличный день", "koi8-r"), ("Отличный день", "cp1251"), ("오늘 정말 좋아요", "euc-kr"), ("يوم جميل", "cp1256"),
     ("今天真开心", "utf-16-le"), ("Отлично", "utf-16-be"), ("great", "utf-32-le"), ("+AGE-", "utf-7")],
)  # fmt: skip
def test_other_encodings_raise_nothing(text: str, encoding: str) -> None:
    """They may be read wrongly; the corpus logs the encoding that was taken."""
    raw = text.encode(encoding)
    assert decode(raw)[0] and decode_lines(raw + b"\n" + bytes(range(256)))


def test_lines_of_a_file_share_an_encoding_and_a_foreign_line_affects_no_other() -> None:
    text = "我们\r\n囧\r\n今天真开心"
    assert decode_lines(text.encode("gb18030")) == [(line, "gb18030") for line in text.split("\r\n")]
    assert decode_lines(text.encode("utf-16")) == [(line, "utf-16-le") for line in text.split("\r\n")]
    mixed = "\ufeff今天\r\n".encode() + "café\n".encode("cp1252") + "你好吗，朋友".encode("gb18030")
    assert decode_lines(mixed) == [("今天", "utf-8"), ("café", "cp1252"), ("你好吗，朋友", "gb18030")]


def test_only_unusable_characters_are_replaced() -> None:
    assert clean("a\0b\x1b\x7f\x85c") == "a b   c"
    assert clean("\ud83d x \ue000 \uffff \U000f0000 \U0010ffff") == "\ufffd x \ufffd \ufffd \ufffd \ufffd"
    usual = "tab\tline\r\nend 😀👩\u200d👩 ﷼ \u202e\u200b\ufeff e\u0301 \ufffd \U0001f1e9"
    assert clean(usual) == usual
