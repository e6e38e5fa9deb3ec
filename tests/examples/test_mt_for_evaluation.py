"""The recipe's parts: languages, sanity, statistics against known numbers, baselines."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import tiny
from recipes_peft.errors import UserError
from tests.examples._recipes import beside

with beside("mt_for_evaluation") as modules:
    RECIPE = vars(modules)
agreement, baselines, table = RECIPE["agreement"], RECIPE["baselines"], RECIPE["language_table"]
represent, translated = RECIPE["representativeness"], RECIPE["translated"]
findings, language_model = RECIPE["findings"], RECIPE["language_model"]
Item, Mark = translated.Item, agreement.Mark
XLMR = table.sizes("xlm-r")


def language(code: str, text: str = "abc", tag: str | None = None, iso3: str = "") -> Any:
    return table.describe(code, tag or code, iso3, text, XLMR, 10.0)


# ---- languages ------------------------------------------------------------------------------


def test_languages_have_a_script_a_flores_code_and_a_class() -> None:
    spanish = language("spa", "derechos", "es", "spa")
    assert (spanish.flores, spanish.family, spanish.resource) == ("spa_Latn", "Romance", "high")
    chinese = [
        language(c, "人人生而自由", t, "cmn") for c, t in (("a", "zh-Hans"), ("b", "zh-Hant"))
    ]
    assert [x.flores for x in chinese] == ["zho_Hans", "zho_Hant"]
    assert language("ja", "すべての人間は").flores == "jpn_Jpan"
    assert language("sw").flores == "swh_Latn"
    assert (language("swh", tag="sw").resource, language("yor", tag="yo").resource) == (
        "low",
        "unseen",
    )
    assert language("als", tag="als").size == XLMR["sq"]
    assert language("tlh").flores is None
    # one language in two scripts is two
    assert language("x", "право", "sr-Cyrl", "srp").flores == "srp_Cyrl"
    assert language("x", "pravo", "sr-Latn", "srp").flores is None


def test_the_table_is_that_of_the_published_sizes() -> None:
    assert len(XLMR) == 93  # 100 rows, of which 5 romanised and 2 second ones
    assert (XLMR["en"], XLMR["ca"], XLMR["ka"], XLMR["sw"]) == (300.8, 10.1, 9.1, 1.6)
    assert set(table._FAMILY) >= set(XLMR)


def test_sizes_of_another_model_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    file.write_text('{"xx": 12}')
    known = table.sizes(str(file))
    assert table.describe("xx", "xx-Latn", "", "a", known, 10.0).resource == "high"
    file.write_text('{"xx": "much"}')
    with pytest.raises(UserError, match="cannot read the pretraining sizes"):
        table.sizes(str(file))
    with pytest.raises(UserError, match=r"xlm-r, bloom, english"):
        table.sizes("nowhere")


def test_the_classes_are_of_what_the_model_read() -> None:
    for model, wanted in {
        "e5-small": "xlm-r",
        "FacebookAI/xlm-roberta-large": "xlm-r",
        "intfloat/multilingual-e5-base": "xlm-r",
        "bigscience/bloomz-7b1": "bloom",
        "models/bloomz-560m/": "bloom",
        "smollm2-135m": "english",
    }.items():
        assert table.read_by(model) == wanted
    for unknown in ("intfloat/e5-small", "tiny", "google/gemma-3-270m"):
        with pytest.raises(UserError, match="not known here; give with --pretraining one of"):
            table.read_by(unknown)
    bloom = table.sizes("bloom")
    # 484,953,009,124 and 391,747 bytes
    assert (len(bloom), round(bloom["en"]), bloom["bm"]) == (45, 452, pytest.approx(0.000365, 1e-3))
    classes = {
        code: table.describe(code, code, "", "a", bloom, 10.0).resource
        for code in ("es", "ca", "sw", "bm", "de", "et")
    }
    assert [c[0] for c in classes.values()] == ["h", "h", "l", "l", "u", "u"]
    only = {x.code: x for x in table.machine_only(["all"], set(), bloom, 10.0)}
    low = ["aka_Latn", "bam_Latn", "yor_Latn", "zul_Latn", "nya_Latn"]
    assert {only[code].resource for code in low} == {"low"}
    missing = set(bloom) - {"en"} - {x.tag for x in only.values()}
    assert missing == set()


def test_all_languages_of_nllb_without_those_that_are_there() -> None:
    found = table.machine_only(["all"], {"spa_Latn", None}, XLMR, 10.0)
    codes = {x.code for x in found}
    assert len(found) == len(codes) == 200
    assert not {"spa_Latn", "eng_Latn"} & codes
    assert {x.code: x.resource for x in found}["fra_Latn"] == "high"
    assert {x.code: x.resource for x in found}["ace_Arab"] == "unseen"
    assert all(x.flores == x.code and x.code.endswith(x.script) for x in found)
    with pytest.raises(UserError, match="'xx_Latn'"):
        table.machine_only(["xx_Latn"], set(), XLMR, 10.0)


def test_languages_are_drawn_by_class_without_a_look_at_scores() -> None:
    everyone = [language(f"q{i}") for i in range(30)] + [language("fr"), language("de")]
    chosen = table.choose(everyone, {"q7"}, 4, 0)
    assert sum(x.resource == "unseen" for x in chosen) == 5
    assert sum(x.resource == "high" for x in chosen) == 2
    assert "q7" in {x.code for x in chosen}
    assert chosen == table.choose(everyone[::-1], {"q7"}, 4, 0)[::-1]
    assert chosen != table.choose(everyone, {"q7"}, 4, 1)


# ---- sanity ---------------------------------------------------------------------------------


def test_copied_tokens_are_counted_in_their_own_source() -> None:
    sources = ["everyone has rights", "slavery shall end"]
    said = ["svatko EVERYONE pravo", "everyone 1234 ropstvo"]
    # longer than three letters: svatko everyone pravo, everyone ropstvo; one is of its source
    assert translated.copy_rate(sources, said) == pytest.approx(1 / 5)
    assert translated.copy_rate(sources, sources) == 1
    assert translated.copy_rate(["abcd"], [""]) == 0


def test_the_report_finds_each_trouble() -> None:
    texts = [f"a sentence with number {i} in it" for i in range(8)]
    items = [Item(str(i), (text,), 0) for i, text in enumerate(texts)]
    said = [f"satz nummer {i} steht da" for i in range(8)]
    said[0], said[1] = "", texts[1].upper()
    said[2] = said[3]
    said[4] = "so la la la " + "la la la la " * 20
    answers = [Item(str(i), (text,), 0) for i, text in enumerate(said)]
    found = translated.sanity(items, answers)
    assert (found.fields, found.empty, found.copied, found.repeated) == (8, 1, 1, 2)
    assert (found.looping, found.length_outliers, found.identical_pairs) == (1, 1, 0)
    pairs = [Item("p", ("one two", "two one"), 1), Item("q", ("a", "a"), 1)]
    same = [Item("p", ("x", "x"), 1), Item("q", ("y", "y"), 1)]
    assert translated.sanity(pairs, same).identical_pairs == 1
    with pytest.raises(ValueError, match="not those of the source"):
        translated.sanity(items, answers[::-1])
    clean = translated.sanity(items[5:], answers[5:])
    assert clean.copy_rate == 0
    assert not clean.flagged
    assert translated.sanity(items, items).flagged


def test_quality_is_of_shared_rows_and_signed() -> None:
    human = [Item("a", ("the cat sat",), 0), Item("b", ("gone",), 0)]
    machine = [Item("a", ("the cat sat",), 0), Item("c", ("other",), 0)]
    found = translated.chrf(machine, human)
    assert (found["chrf"], found["rows"]) == (pytest.approx(100), 1)
    assert "nw:2" in found["signature"]
    assert translated.chrf(machine, human[1:]) is None


# ---- statistics -----------------------------------------------------------------------------

X, Y = [0.2, 0.5, 0.5, 0.7, 0.9, 0.1, 0.4], [0.3, 0.4, 0.6, 0.6, 0.95, 0.2, 0.2]


def test_correlations_are_those_of_scipy() -> None:
    # scipy 1.17: stats.pearsonr and stats.spearmanr, with ties
    assert agreement.pearson(X, Y) == pytest.approx(0.8974386018643875)
    assert agreement.spearman(X, Y) == pytest.approx(0.9082951062292476)
    assert agreement.pearson([1, 1, 1], Y[:3]) is None
    assert agreement.spearman([1, 2], [1, 2]) is None


def marks(right: str, cluster: int = 1) -> dict[str, Any]:
    return {str(i): Mark(int(x), x == "1", str(i // cluster)) for i, x in enumerate(right)}


@pytest.mark.parametrize(
    ("b", "c", "chi2", "p", "exact"),
    [  # scipy 1.17: chi2.sf, binomtest
        (10, 3, 2.769230769230769, 0.0960923294556734, 0.09228515625),
        (25, 8, 7.757575757575758, 0.005348770520482035, 0.004551384132355452),
        (4, 4, 0.125, 0.7236736098317629, 1.0),
    ],
)
def test_mcnemar(b: int, c: int, chi2: float, p: float, exact: float) -> None:
    human, machine = marks("1" * b + "0" * c + "110"), marks("0" * b + "1" * c + "110")
    found = agreement.mcnemar(human, {**machine, "other": Mark(1, True, "x")})
    assert (found["b"], found["c"], found["shared"]) == (b, c, b + c + 3)
    assert found["agreement"] == pytest.approx(3 / (b + c + 3))
    assert [found[k] for k in ("chi2", "p", "exact")] == pytest.approx([chi2, p, exact])


def test_mcnemar_without_a_difference() -> None:
    found = agreement.mcnemar(marks("101"), marks("101"))
    assert (found["chi2"], found["p"], found["exact"], found["agreement"]) == (0, 1, 1, 1)
    assert math.isnan(agreement.mcnemar(marks("1"), {})["agreement"])


def test_agreement_is_signed_and_by_language() -> None:
    human = {"a": 0.5, "b": 0.6, "c": 0.9, "d": 0.2}
    same = agreement.agreement(human, human)
    assert (same["mean_d"], same["max_abs_d"]) == (0, 0)
    assert same["pearson"] == pytest.approx(1)
    machine = {"a": 0.6, "b": 0.5, "c": 1.0, "d": 0.5}
    found = agreement.agreement(human, machine, {"a": 70, "b": 72, "c": 71, "d": 40})
    assert found["mean_d"] == pytest.approx(0.1)
    assert found["mean_abs_d"] == pytest.approx(0.15)
    assert found["max_abs_d"] == pytest.approx(0.3)
    assert found["spearman_abs_d_quality"] < 0
    with pytest.raises(ValueError, match="same languages"):
        agreement.agreement(human, {"a": 1.0})
    with pytest.raises(ValueError, match="no items"):
        agreement.accuracy({})


def test_the_bootstrap_holds_the_difference_and_keeps_pairs_together() -> None:
    human = {name: marks("10" * 30) for name in "abcd"}
    machine = {name: marks("1011" * 15) for name in "abcd"}
    found = agreement.bootstrap(human, machine, 500, 0)
    low, high = found["mean_d over_items"]
    assert low < 0.25 < high
    assert found == agreement.bootstrap(human, machine, 500, 0)
    # items are the same in both sets: what is equal has no spread, however noisy the accuracy
    same = agreement.bootstrap(human, human, 100, 0)
    assert same["mean_d over_items"] == same["mean_abs_d over_both"] == [0, 0]
    # the standard error of the mean of independent differences of 0 and 1
    width = (high - low) / (2 * 1.96)
    assert width == pytest.approx(math.sqrt(0.25 * 0.75 / 60), rel=0.15)
    with pytest.raises(ValueError, match="same languages"):
        agreement.bootstrap(human, {}, 10, 0)


def test_clusters_are_drawn_whole() -> None:
    human = {"a": marks("0" * 60, 6)}
    machine = {"a": marks("1" * 30 + "0" * 30, 6)}
    wide = agreement.bootstrap(human, machine, 500, 0)["mean_d over_items"]
    narrow = agreement.bootstrap({"a": marks("0" * 60)}, {"a": marks("1" * 30 + "0" * 30)}, 500, 0)
    assert wide[1] - wide[0] > 2 * (narrow["mean_d over_items"][1] - narrow["mean_d over_items"][0])


def test_overestimation_and_its_null() -> None:
    scores = {**{f"l{i}": i / 10 for i in range(10)}}
    found = represent.overestimation(scores, {"l9", "l8"}, 500, 0)
    assert found["o"] == pytest.approx(0.85 - 0.45)
    assert (found["official"], found["all"]) == (2, 10)
    assert found["interval"][0] > 0
    assert found["percentile"] > 95
    assert represent.overestimation(scores, {"l0", "l9"}, 500, 0)["o"] == pytest.approx(0)
    assert represent.overestimation(scores, {"other"}, 10, 0) is None
    assert represent.overestimation(scores, set(scores), 10, 0) is None
    assert represent.subset_null([0.1, 0.2], [0.1, 0.2], 50, 0) == 50
    # of the 3 pairs of 1, 2, 3 the mean of 1 and 3 is the middle one
    assert represent.subset_null([1, 2, 3], [1, 3], 2000, 0) == pytest.approx(50, abs=4)
    with pytest.raises(ValueError, match="cannot be drawn"):
        represent.subset_null([1], [1, 2], 5, 0)


def test_the_permutation_test_is_one_sided() -> None:
    small, large = [0.1, 0.2, 0.15, 0.1], [0.8, 0.9, 0.7, 0.85]
    found = represent.permutation_test(small, large, 2000, 0)
    assert found["difference"] == pytest.approx(0.675)
    assert found["p"] == pytest.approx(1 / 70, abs=0.008)  # one of the 70 ways to part eight
    assert represent.permutation_test(large, small, 500, 0)["p"] > 0.9
    assert type(found["p"]) is float  # of another kind, what is judged by it is no JSON
    assert represent.permutation_test([], small, 10, 0) is None


def test_permuted_labels_give_chance() -> None:
    labels = {str(i): i % 4 for i in range(80)}
    right = {key: Mark(label, True, key) for key, label in labels.items()}
    found = findings.permuted({"a": right}, labels, 0)
    assert found["chance"] == pytest.approx(0.25)
    assert found["accuracy"] == pytest.approx(0.25, abs=0.02)
    always = {key: Mark(0, True, key) for key in labels}
    assert findings.permuted({"a": always}, labels, 0)["accuracy"] == pytest.approx(0.25)


# ---- baselines ------------------------------------------------------------------------------


def test_tfidf_is_that_of_scikit_learn() -> None:
    known = ["the right to life", "the right to work", "no one shall be held"]
    grams = baselines.Ngrams(known)
    found = grams.vectors(["the work of life", "zzz"]) @ grams.vectors(known).T
    # scikit-learn 1.9: TfidfVectorizer with the same n-grams
    wanted = torch.tensor([[0.53193608, 0.53193608, 0], [0, 0, 0]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert baselines.nearest(grams.vectors(known), grams.vectors(known), [5, 6, 7]) == [5, 6, 7]


def test_the_regression_is_that_of_scikit_learn() -> None:
    x = torch.tensor([[0.0, 1], [1, 0], [1, 1], [2, 0.5], [0.3, 2], [2, 2]])
    model = baselines.Regression(x, [3, 9, 3, 9, 3, 9], penalty=1e-2)
    # the gradient of the convex loss is zero at its minimum
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    loss = torch.nn.functional.cross_entropy(model.linear(x), y)
    loss = loss + 1e-2 * model.linear.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(model.linear.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 1e-4
    assert set(model.predict(x)) == {3, 9}


def test_the_other_baselines() -> None:
    items = [Item(str(i), (f"{'ab'[i % 2] * 6} {i}",), i % 2) for i in range(20)]
    assert baselines.Majority([*items, Item("x", ("",), 1)]).predict(items) == [1] * 20
    read = [item.fields[0] for item in items]
    wanted = [item.label for item in items]
    model = baselines.CharLstm(read, wanted, steps=60, seed=0)
    assert model.predict(read) == wanted
    assert len(model.predict(["", "ж", "a" * 30])) == 3
    # padding changes nothing
    torch.testing.assert_close(model(["aaa", "b" * 50])[:1], model(["aaa"]))
    premise = "the cat sat on the mat"
    assert baselines.overlap([Item("", (premise, "a dog ran", "the cat slept"), 1)]) == [1]
    shared = baselines.split_marked(baselines.marked(("abcd", "abce")))
    assert {"=abc", "/bcd", "/bce"} <= set(shared)


# ---- the language model ---------------------------------------------------------------------


def test_options_are_scored_as_without_padding() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    options = ["it fell", "it was a much longer end"]
    both = language_model.option_scores(model, tokenizer, "Because", options)
    for option, score in zip(options, both, strict=True):
        start = tokenizer("Because").input_ids
        ids = torch.tensor([start + tokenizer(f" {option}").input_ids])
        logp = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = logp[range(len(logp)), ids[0, 1:]][len(start) - 1 :]
        assert score == pytest.approx(chosen.sum().item() / len(option.encode()), rel=1e-4)


def test_the_prompt_has_the_relation() -> None:
    item = SimpleNamespace(key="7 because", fields=("It broke.", "a", "b"))
    assert language_model.prompt(item) == "It broke because"
    assert language_model.prompt(SimpleNamespace(key="7", fields=("It broke.",))) == "It broke."
