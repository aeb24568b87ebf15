"""The default limit of a text's tokens, and texts cut by a tokenizer."""

from pathlib import Path
from typing import Any

from distill.models import text_limit, tiny
from distill.models.backbone import ModelSettings


def test_the_default_is_half_of_the_context(model_folder: Path, tmp_path: Path) -> None:
    assert text_limit.default_limit(ModelSettings(path=str(model_folder)), 4096) == tiny.CONTEXT // 2
    assert text_limit.default_limit(ModelSettings(path=str(model_folder)), 1000) == 1000
    assert text_limit.default_limit(ModelSettings(), 4096) == tiny.CONTEXT // 2
    assert text_limit.default_limit(None, 4096) == 4096
    assert text_limit.default_limit(ModelSettings(path=str(tmp_path / "none")), 4096) == 4096


def test_texts_are_cut_to_whole_tokens(backbone: Any, tokenizer_folder: Path, model_folder: Path) -> None:
    for settings in (ModelSettings(), ModelSettings(path=str(model_folder))):
        tokenizer = text_limit.tokenizer(settings, tokenizer_folder)
        text = "so " * 20_000
        short = text_limit.cut(text, 100, tokenizer)
        assert text.startswith(short) and 50 < len(short) < 400
        assert len(tokenizer(short, add_special_tokens=False)["input_ids"]) <= 101
        control = text_limit.cut("<|im_end|>" * 1000, 100, tokenizer)  # escaped before it is encoded: many tokens each
        assert len(tokenizer(control.replace("<", "< "), add_special_tokens=False)["input_ids"]) <= 120
        assert text_limit.cut("so good", 100, tokenizer) == "so good"
        assert text_limit.cut("😀" * 50, 7, tokenizer) in "😀" * 7  # never a part of a character
    assert text_limit.tokenizer(None, tokenizer_folder) is None
    assert text_limit.tokenizer(ModelSettings(path="no/such-model"), tokenizer_folder) is None
    assert text_limit.cut("x" * 1000, 100, None) == "x" * 400
