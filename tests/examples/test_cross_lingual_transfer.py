"""The recipe's equations: grid, within and across, overlap, distance, shuffling, spans, scores."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import encoders, tiny
from recipes_peft.errors import UserError
from tests.examples._recipes import beside

with beside("cross_lingual_transfer") as modules:
    RECIPE: Any = modules
answering, grid, pairs = RECIPE.answering, RECIPE.grid, RECIPE.parallel_pairs
segments, shortcuts = RECIPE.segments, RECIPE.shortcuts
Answer, ParallelPairs, Row = pairs.Answer, pairs.ParallelPairs, pairs.Row


def small(**targets: list[Any]) -> Any:
    """Three rows in the languages of `targets`."""
    given = targets or {"en": [1, 0, 1], "de": [1, 0, 1]}
    first = {name: [f"{name} a{i}" for i in range(3)] for name in given}
    second = {name: [f"{name} b{i}" for i in range(3)] for name in given}
    return ParallelPairs(first, second, given, ["x", "x", "y"])


# ---- parallel pairs -----------------------------------------------------------------------------


def test_a_cell_mixes_the_segments_of_two_languages() -> None:
    rows = small().cell("en", "de")
    assert rows[1] == Row(1, "en a1", "de b1", 0)
    assert [row.index for row in rows] == [0, 1, 2]


def test_rows_that_are_missing_or_in_conflict_are_left_out() -> None:
    data = small(en=[1, 0, 1], de=[1, 1, 1], fr=[1, None, 0])
    assert [row.index for row in data.cell("en", "de")] == [0, 2]
    assert [row.index for row in data.cell("en", "fr")] == [0]
    assert [row.index for row in data.cell("fr", "fr")] == [0, 2]
    assert (data.conflicts("en", "de"), data.conflicts("en", "fr")) == (1, 1)


def test_an_answer_is_that_of_the_context() -> None:
    data = small(en=[Answer("a0", 3)] * 3, de=[Answer("a0", 4)] * 3)
    assert data.cell("de", "en")[0].target == Answer("a0", 4)
    assert data.conflicts("en", "de") == 0


def test_sides_that_do_not_fit_are_refused() -> None:
    whole = small()
    short = {"en": whole.second["en"], "de": whole.second["de"][:2]}
    with pytest.raises(UserError, match="de has 2 rows where others have 3"):
        ParallelPairs(whole.first, short, whole.targets, whole.groups)
    with pytest.raises(UserError, match="second has the languages en, the first segment en, de"):
        ParallelPairs(whole.first, {"en": []}, whole.targets, whole.groups)
    with pytest.raises(UserError, match="no text in 'fr'; there is en, de"):
        whole.only(["fr"])


def test_rows_that_share_a_text_are_connected() -> None:
    first = ["a", "b", "c", "d", "e", "a"]
    second = ["x", "c", "y", "x", "e", "z"]
    assert pairs.connected(first, second) == ["a", "b", "b", "a", "e", "a"]
    # in a chain, whatever the order
    assert set(pairs.connected(["p", "s", "q"], ["q", "r", "r"])) == {"p"}


def test_items_make_balanced_pairs_in_every_cell() -> None:
    texts = {
        "en": [("a", "A x"), ("b", "B x"), ("c", "C x")],
        "de": [("ä", "Ä y"), None, ("ç", "Ç y")],
    }
    items = pairs.Items(["1", "2", "3"], texts)
    data = pairs.matching(items, [2, 0, 1])
    assert [(r.first, r.second, r.target) for r in data.cell("en", "de")] == [
        ("a", "Ä y", 1),
        ("a", "Ç y", 0),
    ]
    assert [row.target for row in data.cell("en", "en")] == [1, 0] * 3
    others = pairs.random_others(5, lambda n: n - 1)
    assert others == [4, 0, 1, 2, 3]
    assert all(pairs.random_others(4, lambda n, k=k: k)[i] != i for i in range(4) for k in range(3))


def test_hard_negatives_overlap_most() -> None:
    names = ["guinea", "guinea-bissau"]
    texts = {"en": [*((n, f"republic of {n}") for n in names), ("france", "french republic"), None]}
    items = pairs.Items(list("abcd"), texts)
    assert pairs.hard_others(items, "en", shortcuts.overlap)[:2] == [1, 0]
    assert pairs.hard_others(items, "en", shortcuts.overlap)[3] is None


# ---- the grid -----------------------------------------------------------------------------------


def test_within_across_and_gap_by_hand() -> None:
    m = torch.tensor([[90.0, 60.0, 50.0], [70.0, 80.0, 40.0], [30.0, 20.0, 60.0]])
    found = grid.within_across(m)
    assert found.within.tolist() == [90, 80, 60]
    # (60 + 50 + 70 + 30) / 4, (70 + 40 + 60 + 20) / 4, (30 + 20 + 50 + 40) / 4
    assert found.across.tolist() == [52.5, 47.5, 35]
    assert found.gap.tolist() == [37.5, 32.5, 25]


def test_the_mean_of_across_is_that_of_all_cells_off_the_diagonal() -> None:
    m = torch.rand(5, 7, 7, dtype=torch.float64)
    off = m[:, ~torch.eye(7, dtype=torch.bool)].mean(-1)
    torch.testing.assert_close(grid.within_across(m).across.mean(-1), off)
    torch.testing.assert_close(
        grid.within_across(m).across, grid.within_across(m.transpose(1, 2)).across
    )
    constant = grid.within_across(torch.full((4, 4), 0.5))
    assert constant.gap.abs().max() == 0


def test_the_means_of_the_published_rows() -> None:
    # mBERT on XNLI, published within and across by language: their means are those printed
    within = [
        81.5,
        70.6,
        73.5,
        68.6,
        68.2,
        68.6,
        69.9,
        64.2,
        62.0,
        68.7,
        67.5,
        58.7,
        60.5,
        52.3,
        50.3,
    ]
    across = [
        61.3,
        57.7,
        59.5,
        57.2,
        59.2,
        55.2,
        56.0,
        54.3,
        51.1,
        55.9,
        54.3,
        50.7,
        52.3,
        47.2,
        45.6,
    ]
    # A grid that has these rows: off the diagonal u_P + u_H, whose across is linear in u.
    n, a = 15, torch.tensor(across, dtype=torch.float64)
    total = a.sum() / 2  # (n - 1) across(L) = (n - 2) u_L + sum(u)
    u = ((n - 1) * a - total) / (n - 2)
    m = u[:, None] + u[None, :]
    m.diagonal().copy_(torch.tensor(within, dtype=torch.float64))
    found = grid.within_across(m)
    torch.testing.assert_close(found.across, a)
    means = found.means()
    assert means["within"] == pytest.approx(65.7, abs=0.05)
    assert means["across"] == pytest.approx(54.5, abs=0.05)
    assert means["gap"] == pytest.approx(11.2, abs=0.1)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4,)])
def test_a_grid_of_one_language_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square of two languages or more"):
        grid.within_across(torch.zeros(shape))


def accuracy(found: int, wanted: int) -> float:
    return float(found == wanted)


def test_an_oracle_and_a_constant() -> None:
    data = small(en=[1, 0, 1], de=[1, 0, 1], fr=[1, 0, 1])
    answers = {
        "oracle": lambda row: row.target,
        "constant": lambda row: 0,
    }
    cells = grid.cross_grid(
        lambda rows: {n: list(map(f, rows)) for n, f in answers.items()}, list(answers), data,
        quiet=True,
    )  # fmt: skip
    oracle = grid.scored(cells["oracle"], data, accuracy)
    assert torch.equal(oracle.matrix, torch.ones(3, 3, dtype=torch.float64))
    constant = grid.scored(cells["constant"], data, accuracy)
    torch.testing.assert_close(constant.matrix, torch.full((3, 3), 1 / 3, dtype=torch.float64))
    assert (oracle + constant).count.sum() == 2 * 9 * 3


def test_finished_cells_are_read_and_not_predicted_again(tmp_path: Path) -> None:
    data, asked = small(), []

    def predict(rows: Any) -> Any:
        asked.append(rows[0].first[:2] + rows[0].second[:2])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"m": [row.target for row in rows]}

    with pytest.raises(KeyboardInterrupt):
        grid.cross_grid(predict, ["m"], data, tmp_path, quiet=True)
    found = grid.cross_grid(predict, ["m"], data, tmp_path, quiet=True)
    assert asked == ["enen", "ende", "deen", "deen", "dede"]
    assert found["m"]["en", "de"] == [1, 0, 1]
    (tmp_path / "en-de.json").write_text('{"m": [1]}')
    with pytest.raises(UserError, match="is of other rows than there are now"):
        grid.cross_grid(predict, ["m"], data, tmp_path, quiet=True)
    (tmp_path / "en-de.json").write_text('{"m": [')
    with pytest.raises(UserError, match=r"en-de.json is torn: .*; delete it"):
        grid.cross_grid(predict, ["m"], data, tmp_path, quiet=True)


def test_a_cell_without_rows_is_a_sentence() -> None:
    data = small(en=[1, 0, 1], de=[None] * 3)
    with pytest.raises(UserError, match="no row has both a first segment in en and a second in de"):
        grid.cross_grid(lambda rows: {"m": [0] * len(rows)}, ["m"], data, quiet=True)


def test_classes_are_counted_apart_and_may_be_merged() -> None:
    data = small(en=[0, 1, 2], de=[0, 1, 2])
    cells = {(a, b): [0, 2, 2] if a == b else [1, 1, 2] for a in ("en", "de") for b in ("en", "de")}
    found = grid.by_class(cells, data)
    assert found["0"] == {"within": 1.0, "across": 0.0, "gap": 1.0}
    assert found["1"] == {"within": 0.0, "across": 1.0, "gap": -1.0}
    merged = grid.by_class(cells, data, {0: 0, 1: 1, 2: 1})
    assert merged["1"] == {"within": 1.0, "across": 1.0, "gap": 0.0}
    assert list(merged) == ["0", "1"]
    part = grid.pooled(grid.scored(cells, data, accuracy, lambda row: row.target == 7))
    assert part == {"within": None, "across": None, "gap": None}


def test_the_bootstrap_resamples_groups_in_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    count = torch.full((60, 2, 2), 2.0, dtype=torch.float64)
    right = torch.randint(0, 3, (60, 2, 2), generator=generator).double()
    one = grid.Scores(["a", "b"], right, count)

    def gap(*m: Any) -> Any:
        values = [grid.within_across(x).gap.mean(-1) for x in m]
        return values[0] - values[1] if len(m) > 1 else values[0]

    low, high = grid.bootstrap([one], gap, 500)
    middle = float(grid.within_across(one.matrix).gap.mean())
    assert low < middle < high
    # the deviation of a mean of 60 groups: within and across have two cells each
    cells = right / 2
    each = (cells[:, 0, 0] + cells[:, 1, 1] - cells[:, 0, 1] - cells[:, 1, 0]) / 2
    assert (high - low) / (2 * 1.96) == pytest.approx(float(each.std()) / math.sqrt(60), rel=0.15)
    # what is the same in both has no spread: differences are of the same groups
    better = grid.Scores(["a", "b"], right + torch.eye(2, dtype=torch.float64) * 0.5, count)
    assert grid.bootstrap([better, one], gap, 200) == pytest.approx((0.25, 0.25))


def test_arms_are_compared_in_pairs_on_the_seeds_of_both() -> None:
    generator = torch.Generator().manual_seed(0)
    count = torch.full((40, 2, 2), 2.0, dtype=torch.float64)
    right = torch.randint(0, 3, (2, 40, 2, 2), generator=generator).double()
    one, late = (grid.Scores(["a", "b"], r, count) for r in right)
    better = grid.Scores(["a", "b"], right[0] + torch.eye(2, dtype=torch.float64) * 0.5, count)
    scores = {
        "road": {0: better, 1: late}, "lora": {0: one}, "full": {1: one}, "apiq-2": {0: one},
        "road+mixed": {0: one},
    }  # fmt: skip
    found = RECIPE.analysis.differences(scores, 200)
    assert list(found) == ["road - lora", "road - full", "apiq-2 - lora"]
    assert [found[pair]["seeds"] for pair in found] == [[0], [1], [0]]
    # the same on every group: the intervals have no width
    for of, wanted in {"within": 0.25, "across": 0.0, "gap": 0.25}.items():
        values = found["road - lora"][of]
        assert (values["difference"], *values["95"]) == pytest.approx((wanted,) * 3)
    low, high = found["road - full"]["across"]["95"]
    assert low < found["road - full"]["across"]["difference"] < high
    assert high - low > 0.1
    twice = RECIPE.analysis.differences({"lora": {0: one, 1: late}, "full": {0: one, 1: one}}, 50)
    assert twice["lora - full"]["seeds"] == [0, 1]
    middle = grid.within_across(late.matrix).means()["gap"]
    alone = grid.within_across(one.matrix).means()["gap"]
    assert twice["lora - full"]["gap"]["difference"] == pytest.approx((middle - alone) / 2)


def test_scripts_are_told_apart() -> None:
    assert shortcuts.script(["Armenia, 12", "Ä"]) == "LATIN"
    assert [shortcuts.script([t]) for t in ("Армения", "Αρμενία", "亚美尼亚", "आर्मेनिया")] == [
        "CYRILLIC", "GREEK", "CJK", "DEVANAGARI",
    ]  # fmt: skip
    m = torch.tensor([[1.0, 0.6, 0.2], [0.8, 1.0, 0.4], [0.0, 0.2, 1.0]])
    found = grid.by_script(m, ["en", "de", "el"], {"en": "LATIN", "de": "LATIN", "el": "GREEK"})
    assert found["same"] == pytest.approx(0.7)
    assert found["different"] == pytest.approx(0.2)
    assert found["GREEK-LATIN"] == pytest.approx(0.1)


# ---- shortcuts ----------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    # arm rme men eni nia | rep epu pub ubl bli lic, of, arm rme men eni nia
    assert shortcuts.overlap("Armenia", "Republic of ARMENIA") == 1
    assert shortcuts.overlap("abcd", "xbcd") == 0.5  # bcd of abc bcd
    assert shortcuts.overlap("Armenia", "Армения") == 0
    assert shortcuts.overlap("", "a") == 0
    assert shortcuts.overlap("e\u0301ab", "\u00e9ab") == 1  # composed first


def test_marks_are_kept_in_words() -> None:
    assert shortcuts.words("आर्मेनिया गणराज्य") == ["आर्मेनिया", "गणराज्य"]
    assert shortcuts.words("it's 4-bit, Ünal") == ["it", "s", "4", "bit", "ünal"]
    assert shortcuts.words("在1966年 ab", dense=True) == ["在", "1966", "年", "ab"]


def test_bins_are_those_of_the_figure() -> None:
    values = [0, 0.1, 0.2, 0.39, 0.4, 0.6, 0.8, 0.99, 1]
    assert [shortcuts.BINS.index(shortcuts.bin_of(v)) for v in values] == [
        0, 1, 2, 2, 3, 4, 5, 5, 6,
    ]  # fmt: skip


def test_the_overlap_baseline_finds_the_best_threshold() -> None:
    rows = [
        Row(0, "abcdef", "abcdef", 2),  # 1
        Row(1, "abcdef", "abcdxy", 2),  # abc bcd of 4: .5
        Row(2, "abcdef", "abcxyz", 0),  # .25
        Row(3, "abcdef", "uvwxyz", 0),  # 0
        Row(4, "abcdef", "uvwxyy", 2),  # 0: cannot be right as well
    ]
    found = shortcuts.OverlapBaseline.fit(rows)
    assert (found.threshold, found.above, found.below) == (0.375, 2, 0)
    assert [found(row) for row in rows] == [2, 2, 0, 0, 0]
    # where overlap says nothing, the most frequent class is given everywhere
    same = [Row(i, "abc", "xyz", int(i > 0)) for i in range(3)]
    assert [shortcuts.OverlapBaseline.fit(same)(row) for row in same] == [1, 1, 1]


def test_the_answer_distance_by_hand() -> None:
    context = list("wxqyqabzr")
    # centre of (5, 6) is 5.5: q is 1.5 away (not 3.5), r 2.5; s does not occur; kinds count once
    assert shortcuts.answer_distance(["q", "q", "r", "s"], context, (5, 6)) == 2
    assert shortcuts.answer_distance(["s"], context, (5, 6)) == shortcuts.ABSENT == 400
    assert shortcuts.answer_distance(["q"], context, None) == 400


def test_the_proximity_baseline_answers_next_to_the_question() -> None:
    context = "The mayor of Varna is Ivan Petrov since May."
    rows = [Row(0, context, "Who is the mayor of Varna?", Answer("Ivan Petrov", 22))]
    baseline = shortcuts.ProximityBaseline.fit(rows)
    assert baseline.length == 2
    assert baseline(rows[0]) == "Ivan Petrov"
    assert baseline(Row(0, "", "Who?", Answer("", 0))) == ""
    assert baseline(Row(0, "who who", "who", Answer("", 0))) == "who who"


def test_shuffled_words_are_the_same_words_by_seed() -> None:
    text = "the quick brown fox jumps over it"
    one = shortcuts.shuffle_words(text, 1)
    assert one != text
    assert sorted(one.split()) == sorted(text.split())
    assert one == shortcuts.shuffle_words(text, 1) != shortcuts.shuffle_words(text, 2)
    question = Row(0, text, text, Answer("fox", 16))
    assert shortcuts.shuffled(question, 1) == question._replace(second=one)
    assert shortcuts.shuffled(question._replace(target=1), 1).first == one


# ---- sequences and answers ----------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path))
    return encoders.load_encoder("tiny")[1]


@pytest.mark.parametrize("texts", [("ab", "cde"), ("ж", "z"), ("abcdefgh", "xyzuvwtsr")])
def test_joined_segments_are_those_of_the_tokenizer(tokenizer: Any, texts: Any) -> None:
    one = segments.Segments(tokenizer, 12)
    wanted = tokenizer(*texts, truncation="longest_first", max_length=12)
    found = one.pair(*texts)
    assert found.types == wanted.token_type_ids
    if len(found.ids) < 12:
        assert found.ids == wanted.input_ids
    first = [i for i, s in enumerate(wanted.sequence_ids()) if s == 1]
    assert not first or found.second == first[0]
    assert found.ids.count(tokenizer.sep_token_id) == 2


def test_a_tokenizer_that_does_not_join_pairs_is_refused() -> None:
    with pytest.raises(UserError, match="joins two texts without tokens of its own"):
        segments.Segments(tiny.tokenizer(), 12)


def test_windows_cover_a_context_and_hold_the_answer(tokenizer: Any) -> None:
    given = SimpleNamespace(
        model="tiny", dtype="float32", max_length=19, stride=4, test_batch_size=4
    )
    task = answering.Answering(given, None)
    context = "abcdefghijklmnopqrstuvwxyz"
    row = Row(0, context, "k?m", Answer("klm", 10))
    windows = task.rows([row])
    # room for 16: 3 of the question, windows of 13 that have 4 in common
    assert [(w.begin, w.count) for w in windows] == [(0, 13), (9, 13), (18, 8)]
    for window in windows:
        text = tokenizer.convert_ids_to_tokens(window.joined.ids)
        part = text[window.joined.second : window.joined.second + window.count]
        assert "".join(part) == context[window.begin : window.begin + window.count]
        if window.begin < 18:
            assert "".join(text[window.first : window.last + 1]) == "klm"
        else:
            assert (window.first, window.last) == (0, 0)
    assert task.distance(row) == 1  # k and m stand 1 token from l, in the first 13
    assert task.distance(row._replace(target=Answer("xyz", 23))) == 400
    with pytest.raises(UserError, match="stride is 8; windows of 19 tokens"):
        answering.Answering(SimpleNamespace(**{**vars(given), "stride": 8}), None)


def test_the_best_span_is_in_order_and_not_too_long() -> None:
    start = torch.tensor([0.0, 5.0, 0.5, 0.0, 4.0])
    end = torch.tensor([6.0, 0.0, 1.0, 5.0, 0.0])
    assert answering.spans_of(start, end) == (10.0, 1, 3)
    assert answering.spans_of(start, end, longest=2) == (6.0, 1, 2)
    assert answering.spans_of(start, end, best=1) == (6.0, 0, 0)  # only (1, 0): none in order


def test_exact_match_and_f1_are_those_of_squad() -> None:
    answer = Answer("The Norman conquest, 1066", 0)
    assert answering.exact("norman  conquest 1066!", answer) == 1
    assert answering.f1("norman conquest", answer) == pytest.approx(0.8)  # 2 of 2, 2 of 3
    assert answering.f1("battle", answer) == answering.exact("battle", answer) == 0
    assert answering.f1("", Answer("the", 0)) == 1  # nothing is left of either
