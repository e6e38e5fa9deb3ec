"""The recipe of IKUN: vocabulary, balance, blocks, stages and health by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from recipes_peft import data, tiny
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair, tiny_pairs
from tests.examples import _recipes

with _recipes.beside("ikun") as _modules:
    VOCABULARY = _modules.vocabulary  # for hypothesis, which takes no fixture of a function
RUSSIAN = ["мама мыла раму", "мама мыла окно", "папа мыл раму", "папа и мама мыли окно"] * 3
ENGLISH = ["the cat sat on the mat", "the man ran to the van"]


@pytest.fixture
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("ikun") as modules:
        yield modules


# ---- vocabulary ---------------------------------------------------------------------------------


def test_the_length_ratio_is_a_mean_over_texts(recipe: Any) -> None:
    assert recipe.vocabulary.length_ratio([6, 4], [2, 4]) == 2.0


def test_the_pair_that_saves_most_is_merged_first(recipe: Any) -> None:
    words = {("a", "b", "c"): 3, ("a", "b"): 2, ("b", "c", "d"): 4}
    assert recipe.vocabulary.learn(words, 2) == [("b", "c"), ("bc", "d")]
    # ab and bc overlap: once bc is merged, ab is left in the word ab alone
    assert recipe.vocabulary.learn(words, 9) == [
        ("b", "c"), ("bc", "d"), ("a", "bc"), ("a", "b"),
    ]  # fmt: skip
    assert recipe.vocabulary.learn(words, 1, lambda pair: pair != ("b", "c")) == [("a", "b")]


WORDS = st.dictionaries(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=7).map(tuple), st.integers(1, 9)
)


@given(words=WORDS)
def test_merges_are_those_of_counting_anew_every_time(words: Any) -> None:
    vocabulary = VOCABULARY
    cut, wanted = {word: list(word) for word in words}, []
    while len({"".join(pair) for pair in wanted}) < 5:
        counts: Counter[tuple[str, str]] = Counter()
        for word, pieces in cut.items():
            for pair in pairwise(pieces):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        wanted.append(best)
        cut = {word: vocabulary.joined(pieces, best) for word, pieces in cut.items()}
    assert vocabulary.learn(words, 5) == wanted


@pytest.fixture
def extension(recipe: Any) -> Any:
    return recipe.vocabulary.extend(tiny.tokenizer(), RUSSIAN, ENGLISH, 30, 8)


def test_new_pieces_are_the_base_s_tokens_joined(recipe: Any, extension: Any) -> None:
    base = tiny.tokenizer()
    texts = [*RUSSIAN, *ENGLISH, "", "мама — it's 母\u200d!", "\n a  b ", "<end> мама"]
    assert recipe.vocabulary.expands_to_base(extension, base, texts)
    assert recipe.vocabulary.lossless(extension.tokenizer, texts)
    short, long = (sum(recipe.vocabulary.lengths(t, RUSSIAN)) for t in (extension.tokenizer, base))
    assert short < long / 2
    assert extension.tokenizer(ENGLISH).input_ids == base(ENGLISH).input_ids
    assert len(extension.tokenizer) % 8 == 0
    assert extension.ids == list(range(257, len(extension.tokenizer)))
    for name in ("eos_token_id", "pad_token_id"):
        assert getattr(extension.tokenizer, name) == getattr(base, name)


def test_the_protected_language_is_cut_as_before(recipe: Any) -> None:
    turkish = ["dala kara dala", "kara dala kara"] * 3
    free = recipe.vocabulary.extend(tiny.tokenizer(), turkish, [], 10)
    kept = recipe.vocabulary.extend(tiny.tokenizer(), turkish, ["ala ka"], 10)
    assert len(free.tokenizer("ala ka").input_ids) < 6
    assert len(kept.tokenizer("ala ka").input_ids) == 6
    assert len(kept.tokenizer("dala kara").input_ids) < 9


def test_an_extension_comes_back_from_its_folder(
    recipe: Any, extension: Any, tmp_path: Path
) -> None:
    extension.save(tmp_path)
    loaded = recipe.vocabulary.Extension.load(tmp_path)
    assert (loaded.ids, loaded.segments) == (extension.ids, extension.segments)
    assert loaded.tokenizer(RUSSIAN).input_ids == extension.tokenizer(RUSSIAN).input_ids
    assert loaded.tokenizer.pad_token_id == tiny.tokenizer().pad_token_id


def test_pieces_end_when_they_are_enough(recipe: Any) -> None:
    def enough(tokenizer: Any) -> bool:
        return sum(recipe.vocabulary.lengths(tokenizer, RUSSIAN)) <= 150

    made = recipe.vocabulary.extend(tiny.tokenizer(), RUSSIAN, [], 60, enough=enough)
    fewer = recipe.vocabulary.extend(tiny.tokenizer(), RUSSIAN, [], len(made.ids) - 1)
    assert enough(made.tokenizer)
    assert not enough(fewer.tokenizer)


def test_signs_that_were_bytes_become_pieces(recipe: Any) -> None:
    """Like Mistral's: SentencePiece's BPE, bytes where a sign is not known, no pre-tokenizer."""
    signs = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a"]
    inner = Tokenizer(
        models.BPE(
            {sign: i for i, sign in enumerate(signs)},
            [("▁", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    base = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<unk>", pad_token="<unk>")
    made = recipe.vocabulary.extend(base, ["яя яя bя яя"] * 2, ["a b"], 3)
    assert made.tokenizer.convert_ids_to_tokens(made.ids) == ["я", "яя", "▁яя"]
    assert made.segments[0] == base.convert_tokens_to_ids(["<0xD1>", "<0x8F>"])
    assert made.segments[2] == [257, *made.segments[0], *made.segments[0]]
    texts = [" яя a", "abя", "ж яя"]
    assert recipe.vocabulary.lossless(made.tokenizer, texts)
    assert recipe.vocabulary.expands_to_base(made, base, texts)


def test_what_is_no_bpe_or_too_little_is_refused(recipe: Any) -> None:
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")),
    )
    with pytest.raises(UserError, match="of the kind WordLevel; only a BPE"):
        recipe.vocabulary.extend(words, RUSSIAN, [], 8)
    with pytest.raises(UserError, match="too few for a vocabulary"):
        recipe.vocabulary.extend(tiny.tokenizer(), ["мама"] * 2, [], 30, 64)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_and_old_logits_stay(recipe: Any, extension: Any, tied: bool) -> None:
    made = model(tied)
    ids = torch.tensor([tiny.tokenizer()(ENGLISH[0]).input_ids])
    before = recipe.vocabulary.logits_of(made, ids, 257)
    old = made.get_output_embeddings().weight.detach().clone()
    recipe.vocabulary.extend_model(made, extension)
    after = recipe.vocabulary.logits_of(made, ids, 257)
    assert recipe.vocabulary.change(before, after) <= 1e-6
    head = made.get_output_embeddings().weight
    assert head.shape[0] == len(extension.tokenizer) == made.config.vocab_size
    assert (made.get_input_embeddings().weight is head) == tied
    torch.testing.assert_close(head[extension.ids[5]], old[extension.segments[5]].mean(0))
    assert len(recipe.vocabulary.new_rows(made, extension)) == (1 if tied else 2)


def model(tied: bool) -> Any:
    made = tiny.model(layers=1)
    if tied:
        made.config.tie_word_embeddings = True
        made.tie_weights()
    return made.requires_grad_(False).eval()


def test_mean_rows_of_a_small_matrix(recipe: Any) -> None:
    weight = torch.tensor([[0.0, 2.0], [4.0, 6.0], [8.0, 1.0]])
    found = recipe.vocabulary.mean_rows(weight, [[0, 1], [2]])
    assert found.tolist() == [[2.0, 4.0], [8.0, 1.0]]


# ---- languages in balance -----------------------------------------------------------------------


def test_temperature_flattens_the_shares(recipe: Any) -> None:
    sizes = {"a": 1, "b": 16}
    assert recipe.mixture.shares(sizes, 1.0) == pytest.approx({"a": 1 / 17, "b": 16 / 17})
    assert recipe.mixture.shares(sizes, 2.0) == pytest.approx({"a": 0.2, "b": 0.8})
    assert recipe.mixture.shares(sizes, math.inf) == {"a": 0.5, "b": 0.5}


def test_no_language_is_read_too_often(recipe: Any) -> None:
    found = recipe.mixture.quotas({"a": 10, "b": 100, "c": 100}, 120, math.inf, 2.0)
    assert found == pytest.approx({"a": 20, "b": 50, "c": 50})
    # what a cannot give goes to the others, and brings the next to its limit
    found = recipe.mixture.quotas({"a": 10, "b": 30, "c": 100}, 120, math.inf, 1.0)
    assert found == pytest.approx({"a": 10, "b": 30, "c": 80})
    assert recipe.mixture.quotas({"a": 1, "b": 2}, 100, 1.0, 2.0) == {"a": 2, "b": 4}


def test_texts_come_in_proportion_and_again(recipe: Any) -> None:
    texts = {"a": ["aa"], "b": ["bbbb", "cccc"], "c": ["never"]}
    found = list(recipe.mixture.mixture(texts, {"a": 4, "b": 12, "c": 0}))
    assert Counter(found) == {("a", "aa"): 2, ("b", "bbbb"): 2, ("b", "cccc"): 1}
    assert [language for language, _ in found] == ["a", "b", "b", "a", "b"]
    with pytest.raises(UserError, match="has no text"):
        list(recipe.mixture.mixture({"a": [""]}, {"a": 1}))


def test_texts_of_files_and_of_data_sets(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "ru.txt").write_text("семь\n\nпять\n", encoding="utf-8")
    found = recipe.mixture.monolingual(str(tmp_path), "", ["ru"], 0)
    assert sorted(found["ru"]) == ["пять", "семь"]
    pytest.importorskip("datasets")
    (tmp_path / "set" / "tr_meta").mkdir(parents=True)
    rows = '{"content": "bir"}\n{"content": "iki"}\n'
    (tmp_path / "set" / "tr_meta" / "part.jsonl").write_text(rows, encoding="utf-8")
    found = recipe.mixture.monolingual(str(tmp_path / "set"), "{language}_meta", ["tr"], 0)
    assert [sorted(found["tr"]) for _ in range(2)] == [["bir", "iki"]] * 2  # read again
    with pytest.raises(UserError, match="cannot open the data set"):
        recipe.mixture.monolingual(str(tmp_path / "set"), "{language}_meta", ["hi"], 0)


def test_lines_of_the_pairs_are_left_out_of_other_texts(recipe: Any, tmp_path: Path) -> None:
    parts = recipe.corpus.Parts(
        {},
        {"en-ru": [Pair("A  Cat", "Кот", "en", "ru", "d")]},
        {"en-ru": [Pair("The end", "Конец.", "en", "ru", "e")]},
    )
    held = recipe.corpus.held_lines(parts)
    assert held == {"en": {"a cat", "the end"}, "ru": {"кот", "конец."}}
    met: set[str] = set()
    found = recipe.mixture.without(["A cat", "a cat ran", "THE END ", "кот"], held["en"], met)
    assert found == ["a cat ran", "кот"]
    assert met == {"a cat", "the end"}
    pytest.importorskip("datasets")
    (tmp_path / "tr").mkdir()
    rows = '{"text": "bir\\nA CAT\\niki"}\n{"text": "the  end"}\n'
    (tmp_path / "tr" / "part.jsonl").write_text(rows, encoding="utf-8")
    stream = recipe.mixture.monolingual(str(tmp_path), "{language}", ["tr"], 0)["tr"]
    seen: set[str] = set()
    texts = recipe.mixture.without(stream, held["en"], seen)
    assert not seen  # nothing is read before it is asked for
    assert [list(texts) for _ in range(2)] == [["bir\niki"]] * 2
    assert seen == met


# ---- parts and rows -----------------------------------------------------------------------------


def test_documents_stand_in_one_part(recipe: Any) -> None:
    sizes = {f"d{i}": 10 for i in range(20)} | {"large": 90}
    first, second, rest = recipe.corpus.assign(sizes, [0.1, 0.2], 0)
    assert not (first & second | first & rest | second & rest)
    assert first | second | rest == set(sizes)
    assert "large" in rest
    assert (len(first), len(second)) == (3, 6)  # 10 % and 20 % of 290 lines, at least
    assert recipe.corpus.assign(sizes, [0.1, 0.2], 1)[0] != first
    with pytest.raises(UserError, match="2 documents; give at least 3"):
        recipe.corpus.assign({"a": 1, "b": 1}, [0.1, 0.2], 0)


def test_no_line_stands_in_two_parts(recipe: Any) -> None:
    pairs = {d: tiny_pairs(*d.split("-"), count=200) for d in ("en-ru", "ru-tr")}
    pairs["en-ru"] += [Pair("same", "то же", "en", "ru", f"toy {i}") for i in range(50)]
    parts = recipe.corpus.parts_of(pairs, 0.2, 0.1, 0, 100)
    assert set(parts.texts) == {"en", "ru", "tr"}
    lines = [
        {side for ps in part.values() for p in ps for side in recipe.corpus._sides(p)}
        for part in (parts.tuning, parts.test)
    ]
    texts = {(language, text) for language, found in parts.texts.items() for text in found}
    assert [a & b for a, b in combinations([*lines, texts], 2)] == [set()] * 3
    for found in parts.texts.values():
        assert len(found) == len(set(found)) > 50
    # the same documents in all directions
    documents = [{p.document for p in parts.test[name]} for name in pairs]
    assert documents[0] == documents[1]
    short = recipe.corpus.parts_of(pairs, 0.2, 0.1, 0, 20)
    assert max(len(text) for found in short.texts.values() for text in found) <= 20


def test_a_test_of_its_own_leaves_all_pairs_to_learn_but_its_lines(recipe: Any) -> None:
    pairs = {"en-ru": tiny_pairs("en", "ru", count=40)}
    test = {"en-ru": [pairs["en-ru"][3], Pair("CANARY", "x", "en", "ru", "0")]}
    test = {
        name: recipe.corpus.without_canary([*found[1:], *found[:1]]) for name, found in test.items()
    }
    parts = recipe.corpus.parts_of(pairs, 1.0, test, 0, 100)
    assert parts.test == {"en-ru": [pairs["en-ru"][3]]}
    assert parts.texts == {}
    long = {"en-ru": [*test["en-ru"], Pair("x", "y" * 101, "en", "ru", "1")]}
    assert recipe.corpus.parts_of(pairs, 1.0, long, 0, 100).test == parts.test
    assert pairs["en-ru"][3] not in parts.tuning["en-ru"]
    assert len(parts.tuning["en-ru"]) >= 38


def test_lines_of_a_document_are_joined(recipe: Any) -> None:
    pairs = [Pair(f"s{i}", f"t{i}", "en", "ru", "a" if i < 6 else "b") for i in range(8)]
    found = recipe.corpus.join_lines(pairs, 3)
    assert [p.source for p in found] == ["s0", "s1 s2", "s3 s4 s5", "s6", "s7"]
    assert [p.target for p in found][1] == "t1 t2"
    assert recipe.corpus.join_lines(pairs, 1) == pairs


def test_blocks_are_documents_end_to_end(recipe: Any) -> None:
    found = list(recipe.corpus.pack_blocks([[1, 2, 0], [3, 0], [4, 5, 6, 0]], 4))
    assert [block.ids for block in found] == [[1, 2, 0, 3], [0, 4, 5, 6]]
    assert [block.documents for block in found] == [[0, 0, 0, 1], [1, 2, 2, 2]]
    ids = recipe.corpus.document_ids(tiny.tokenizer(), "ab")
    assert ids == [*tiny.tokenizer()("ab").input_ids, 256]


def test_a_document_sees_itself_alone(recipe: Any) -> None:
    block = recipe.corpus.Block([5, 6, 7, 8, 9], [0, 0, 1, 1, 1])
    across = recipe.corpus.block_batch([block], within=False)
    assert across["labels"].tolist() == [block.ids]
    batch = recipe.corpus.block_batch([block], within=True)
    assert batch["labels"].tolist() == [[-100, 6, -100, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    made = model(False)
    packed = made(**batch)
    alone = [made(input_ids=torch.tensor([ids])).logits for ids in ([5, 6], [7, 8, 9])]
    torch.testing.assert_close(packed.logits, torch.cat(alone, 1))
    assert not torch.allclose(made(**across).logits[0, 2:], alone[1][0])


def test_only_the_translation_and_its_end_are_learnt(recipe: Any) -> None:
    row = recipe.corpus.pair_row(Pair("мама", "mother", "ru", "en", "d"), tiny.tokenizer())
    text = "Translate this from Russian to English:\nRussian: мама\nEnglish:"
    assert tiny.tokenizer().decode(row.prompt) == text
    assert tiny.tokenizer().decode(row.answer) == " mother<end>"
    batch = data.collate([row], tiny.tokenizer().pad_token_id)
    assert batch["labels"][0].tolist()[-1] == tiny.tokenizer().eos_token_id
    line = recipe.corpus.text_row("ab", tiny.tokenizer())
    assert line == ([256], [*tiny.tokenizer()("ab").input_ids, 256])


def test_rows_are_whole_or_not_there(recipe: Any, extension: Any) -> None:
    tokenizers, texts = [tiny.tokenizer(), extension.tokenizer], ["мама", "мама мыла раму", "ab"]
    rows = [[recipe.corpus.text_row(text, t) for text in texts] for t in tokenizers]
    base, new = ([len(prompt) + len(answer) for prompt, answer in some] for some in rows)
    assert new[1] < base[1]
    assert recipe.corpus.fitting(recipe.corpus.text_row, texts, tokenizers, base[1]) == texts
    # it would fit in the new vocabulary, but models are compared on the same
    shorter = base[1] - 1
    found = recipe.corpus.fitting(recipe.corpus.text_row, texts, tokenizers, shorter)
    assert found == ["мама", "ab"]
    assert recipe.corpus.fitting(recipe.corpus.text_row, texts, tokenizers[1:], shorter) == texts


def test_bits_are_of_rows_that_fit_and_the_others_are_counted(recipe: Any) -> None:
    short, long = Pair("a", "b", "en", "ru", "d"), Pair("a", "b" * 90, "en", "ru", "d")
    source = Pair("x" * 150, "b", "en", "ru", "d")
    test = {"en-ru": [short, long, source, Pair("z" * 200, "z", "en", "ru", "d")]}
    work = SimpleNamespace(
        given=SimpleNamespace(test_pairs=3, max_length=100),
        parts=recipe.corpus.Parts({}, {}, test),
        tokenizers=[tiny.tokenizer()],
    )
    found = recipe.measure.measured(work)
    assert found.pairs == {"en-ru": [short]}
    # 90 signs fit as a text alone, 150 do not
    assert found.lines == {"en": ["a"], "ru": ["b", "b" * 90]}
    assert found.left_out == 3
    work.given.max_length = 60
    with pytest.raises(UserError, match="no line of the test of en-ru fits into 60 tokens"):
        recipe.measure.measured(work)
