"""The recipe's translators, and the cache of what they gave."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import M2M100Config, M2M100ForConditionalGeneration

from recipes_peft import tiny
from recipes_peft.errors import UserError
from tests.examples.test_mt_for_evaluation import RECIPE, Item, language

translated, translators = RECIPE["translated"], RECIPE["translators"]


class Upper:
    """Translates by capitals; counts its calls."""

    system = "upper"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def translate(self, texts: Any, language: Any) -> list[str]:
        self.seen += texts
        return [text.upper() for text in texts]


ITEMS = [Item(str(i), (f"text {i // 2}", "same"), i % 2) for i in range(40)]


def test_a_data_set_is_translated_field_by_field_once(tmp_path: Path) -> None:
    translator = Upper()
    found = translated.translate_dataset(ITEMS, translator, language("xx"), tmp_path)
    assert [(x.key, x.label) for x in found] == [(x.key, x.label) for x in ITEMS]
    assert found[3].fields == ("TEXT 1", "SAME")
    assert len(translator.seen) == len(set(translator.seen)) == 21
    again = Upper()
    assert translated.translate_dataset(ITEMS, again, language("xx"), tmp_path) == found
    assert again.seen == []
    translated.translate_dataset(ITEMS, again, language("yy"), tmp_path)  # not of this language
    assert len(again.seen) == 21


def test_an_interrupted_translation_goes_on(tmp_path: Path) -> None:
    class Stops(Upper):
        def translate(self, texts: Any, language: Any) -> list[str]:
            if self.seen:
                raise KeyboardInterrupt
            return super().translate(texts, language)

    with pytest.raises(KeyboardInterrupt):
        translated.translate_dataset(ITEMS, Stops(), language("xx"), tmp_path)
    rest = Upper()
    translated.translate_dataset(ITEMS, rest, language("xx"), tmp_path)
    assert len(rest.seen) == 5  # 16 were kept


def test_a_translator_must_give_as_many(tmp_path: Path) -> None:
    class Less(Upper):
        def translate(self, texts: Any, language: Any) -> list[str]:
            return []

    with pytest.raises(UserError, match="gave 0 translations of 16 texts"):
        translated.translate_dataset(ITEMS, Less(), language("xx"), tmp_path)


def test_a_command_translates_its_input() -> None:
    shift = translators.CommandTranslator("tr a-y b-z | tr b B")
    assert shift.translate(["a cat\nsat", "ähm"], language("xx")) == ["B dBu tBu", "äin"]
    with pytest.raises(translators.MissingError, match="no program 'no-such-program'"):
        translators.CommandTranslator("cat | no-such-program")
    failing = translators.CommandTranslator(f"{sys.executable} -c 'raise SystemExit(3)'")
    with pytest.raises(translators.MissingError, match="failed with status 3"):
        failing.translate(["a"], language("xx"))
    slow = translators.CommandTranslator("sleep 5", timeout_s=0.1)
    with pytest.raises(UserError, match="timed out"):
        slow.translate(["a"], language("xx"))


@pytest.mark.skipif(shutil.which("apertium") is None, reason="apertium is not installed")
def test_apertium_translates() -> None:
    try:
        spanish = translators.CommandTranslator("apertium -u eng-spa")
        found = spanish.translate(["Everyone has the right to life."], language("spa"))
    except translators.MissingError:
        pytest.skip("apertium-eng-spa is not installed")
    assert "derecho" in found[0]


def test_a_function_and_a_file_translate(tmp_path: Path) -> None:
    turned = translators.CallableTranslator(lambda text: text[::-1], "turn")
    assert turned.translate(["abc"], language("xx")) == ["cba"]
    with pytest.raises(UserError, match="gave None"):
        translators.CallableTranslator(lambda text: None, "none").translate(["a"], language("xx"))
    named = translators.CallableTranslator.named("string.capwords")
    assert named.translate(["a b"], language("xx")) == ["A B"]
    method = translators.CallableTranslator.named("string.Formatter.format")
    assert method.translate(["a"], language("xx")) == ["a"]
    # a function of a module within packages, and a method of a class of one
    for name in ("xml.sax.saxutils.escape", "email.charset.Charset.header_encode"):
        assert translators.CallableTranslator.named(name).system == f"python:{name}"
    escape = translators.CallableTranslator.named("xml.sax.saxutils.escape")
    assert escape.translate(["a<b"], language("xx")) == ["a&lt;b"]
    for missing in ("no_such_module.f", "string.no_such_name", "f"):
        with pytest.raises(translators.MissingError, match="cannot import"):
            translators.CallableTranslator.named(missing)

    file = tmp_path / "mt.jsonl"
    rows = [{"source": "a", "target": "b"}, {"source": "a", "target": "c", "language": "xx"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    known = translators.PrecomputedTranslator(file)
    assert known.translate(["a"], language("xx")) == ["c"]
    assert known.translate(["a"], language("yy")) == ["b"]
    with pytest.raises(UserError, match="no translation to yy of 'z'"):
        known.translate(["z"], language("yy"))
    file.write_text('{"source": "a"}')
    with pytest.raises(UserError, match=r"line 1: 'target' is missing"):
        translators.PrecomputedTranslator(file)


def test_a_file_that_changed_is_another_system(tmp_path: Path) -> None:
    file, items = tmp_path / "mt.jsonl", [Item("1", ("a",), 0)]
    for target in ("b", "c"):
        file.write_text(json.dumps({"source": "a", "target": target}))
        known = translators.PrecomputedTranslator(file)
        found = translated.translate_dataset(items, known, language("xx"), tmp_path / "cache")
        assert found[0].fields == (target,)


def test_a_word_of_the_settings_makes_a_translator() -> None:
    code, make = translators.make("spa=command:cat")
    assert (code, make().system) == ("spa", "command:cat")
    for wrong in ("spa", "spa=cat", "spa=cloud:x", "=command:cat", "spa=command:"):
        with pytest.raises(UserError, match="write LANGUAGE=KIND:REST"):
            translators.make(wrong)


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random translator in the format of NLLB, with bytes and two languages as tokens."""
    folder = tmp_path_factory.mktemp("nllb")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("eng_Latn", "spa_Latn", "<unk>")])
    tokenizer.unk_token = "<unk>"
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        bos_token_id=256,
        pad_token_id=256,
        eos_token_id=256,
        decoder_start_token_id=256,
    )
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_nllb_begins_with_the_language_and_keeps_the_order(nllb: Path) -> None:
    translator = translators.NllbTranslator(str(nllb), beams=2, batch_size=2, longest=20)
    calls, generate = [], translator.model.generate

    def watched(**given: Any) -> Any:
        calls.append(given)
        return generate(**given)

    translator.model.generate = watched
    spanish = language("spa", "a", "es", "spa")
    texts = ["A sentence here. Another one there.", "short", "z"]
    together = translator.translate(texts, spanish)
    assert len(together) == 3
    code = translator.tokenizer.convert_tokens_to_ids("spa_Latn")
    assert {call["forced_bos_token_id"] for call in calls} == {code}
    # the long one went in two sentences, with the shorter texts first
    assert [len(call["input_ids"]) for call in calls] == [2, 2]
    assert all(
        call["max_new_tokens"] == 2 * call["input_ids"].shape[1] + 8 and call["num_beams"] == 2
        for call in calls
    )
    output = generate(**calls[0])
    assert (output[:, 1] == code).all()
    for missing in (language("tlh"), language("fr")):  # no code; a code that it does not know
        with pytest.raises(translators.MissingError, match="does not have"):
            translator.translate(texts, missing)


def test_sentences_are_cut_after_their_signs() -> None:
    assert translators.sentences("One. Two; three!") == ["One.", "Two;", "three!"]
    assert translators.sentences("3.5 percent") == ["3.5 percent"]
