"""The self-correction recipe: simulated noise, filters, self-knowledge, plan and promises."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recipes_peft import parallel, tiny, translation
from recipes_peft.errors import UserError
from recipes_peft.parallel import Pair
from tests.examples import _recipes

with _recipes.beside("self_correction"):
    from correcting import Watch, _batches
    from correction import SelfCorrectionLoss
    from correction_arms import Run, plan
    from correction_report import TRUSTED, exact, grouped, promises, verdict
    from misalignment import (
        auroc,
        band_of,
        char_tfidf,
        embed,
        filter_scores,
        keep_best,
        simulate_misalignment,
        without_repeats,
    )
    from noisy_corpus import apart, chunks, part, prepare
    from self_knowledge import TEMPERATURES, Tokens, check, matched, row_losses, tokens

# ---- noise --------------------------------------------------------------------------------------


def pairs(count: int = 120) -> list[Pair]:
    return without_repeats(parallel.tiny_pairs("de", "en", count))


@pytest.mark.parametrize("preset", ["shuffle", "easy", "medium", "hard"])
def test_noise_keeps_sources_and_takes_real_targets(preset: str) -> None:
    clean = pairs()
    vectors = char_tfidf([p.target for p in clean])
    noisy = simulate_misalignment(clean, vectors, 0.5, band_of(preset, vectors), seed=1)
    assert [n.pair.source for n in noisy] == [p.source for p in clean]
    assert sum(n.noisy for n in noisy) == round(0.5 * len(clean))
    targets = {p.target for p in clean}
    for n, p in zip(noisy, clean, strict=True):
        assert n.noisy == (n.pair.target != p.target)
        assert n.pair.target in targets
        assert len(p.target) / 2 <= len(n.pair.target) <= 2 * len(p.target)
    assert max(Counter(n.pair.target for n in noisy if n.noisy).values()) <= 3
    again = simulate_misalignment(clean, vectors, 0.5, band_of(preset, vectors), seed=1)
    assert again == noisy
    other = simulate_misalignment(clean, vectors, 0.5, band_of(preset, vectors), seed=2)
    assert other != noisy


def test_presets_are_ordered_by_similarity() -> None:
    clean = pairs()
    vectors = char_tfidf([p.target for p in clean])
    means = []
    for preset in ("shuffle", "easy", "medium", "hard"):
        noisy = simulate_misalignment(clean, vectors, 0.5, band_of(preset, vectors), seed=0)
        found = [n.similarity for n in noisy if n.noisy]
        means.append(sum(found) / len(found))
    assert means == sorted(means)
    assert means[0] < means[1] < means[3]


def test_the_target_in_the_band_is_taken_or_the_nearest_to_it() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    clean = [Pair(f"s{i}", f"t{i}", "de", "en", "d") for i in range(4)]
    noisy = simulate_misalignment(clean, vectors, 1.0, (0.55, 0.65), seed=0)
    assert noisy[0].pair.target == "t2"  # 0.6 alone is in the band
    assert noisy[3].pair.target == "t1"
    far = simulate_misalignment(clean, vectors, 1.0, (0.7, 0.75), seed=0)
    assert far[0].pair.target == "t1"  # 0.8 is nearer than 0.6
    with pytest.raises(UserError, match="rate of noise is 2"):
        simulate_misalignment(clean, vectors, 2, (0, 1), seed=0)
    with pytest.raises(UserError, match="no other target is left for 't0'"):
        simulate_misalignment(clean[:1], vectors[:1], 1.0, (0, 1), seed=0)


def test_no_noise_is_no_change() -> None:
    clean = pairs(20)
    noisy = simulate_misalignment(clean, char_tfidf([p.target for p in clean]), 0, (0, 1), 0)
    assert [n.pair for n in noisy] == clean


def test_characters_tell_similar_texts() -> None:
    near, far = "the cats sat on a mat", "quarterly revenue rose"
    vectors = char_tfidf(["the cat sat on the mat", near, far, ""])
    torch.testing.assert_close(vectors[:3].norm(dim=-1), torch.ones(3))
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    assert torch.isfinite(vectors).all()


def test_an_encoder_gives_a_text_the_same_vector_in_any_batch() -> None:
    model, tokenizer = tiny.model().model, tiny.tokenizer()
    texts = ["one", "a good deal longer", "two words"]
    together = embed(texts, model, tokenizer, batch_size=3)
    alone = torch.cat([embed([text], model, tokenizer) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_repeats_are_dropped() -> None:
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("c", "z"), ("d", "y")]
    found = without_repeats([Pair(s, t, "de", "en", "d") for s, t in rows])
    assert [p.source for p in found] == ["a", "c"]


def test_filters_find_what_they_look_for() -> None:
    rows = [Pair("aaaa bbbb", "aaaa bbbb", "x", "y", "d") for _ in range(4)]
    rows.append(Pair("aaaa bbbb", "cccc dddd eeee ffff gggg", "x", "y", "d"))
    vectors = char_tfidf([p.source for p in rows] + [p.target for p in rows])
    scores = filter_scores(rows, [1.0, 1, 1, 1, 9], (vectors[:5], vectors[5:]))
    flags = torch.tensor([False] * 4 + [True])
    assert {n: auroc(torch.tensor(s), flags) for n, s in scores.items()} == {
        "length": 1,
        "similarity": 1,
        "loss": 1,
    }
    assert keep_best(rows, scores["length"], 0.2) == rows[:4]
    assert "loss" not in filter_scores(rows, None, (vectors[:5], vectors[5:]))


def test_auroc_counts_pairs_in_the_right_order() -> None:
    scores, flags = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert auroc(scores, flags) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert auroc(torch.ones(4), flags) == 0.5
    assert auroc(scores, torch.ones(4, dtype=torch.bool)) is None


# ---- data ---------------------------------------------------------------------------------------


def test_word_by_word_pairs_are_cut_into_pieces() -> None:
    found = chunks([Pair("a b c d", "A B C D", "x", "y", "d"), Pair("a b", "A", "x", "y", "d")], 2)
    assert [(p.source, p.target) for p in found] == [("a", "A"), ("b c", "B C"), ("d", "D")]


def asked(**changes: Any) -> SimpleNamespace:
    given = {
        **{"data": "tiny", "test_data": None, "source": "de", "target": "en", "words": None},
        **{"max_length": 200, "test_pairs": 8, "development_pairs": 8, "train_pairs": 50},
        **{"warm_steps": 1, "warm_pairs": 20, **changes},
    }
    return SimpleNamespace(**given)


def test_parts_of_the_corpus_share_no_document() -> None:
    corpus = prepare(asked(), tiny.tokenizer())
    sides = (corpus.train, corpus.warm, corpus.development, corpus.test)
    documents = [{p.document for p in side} for side in sides]
    assert len(set().union(*documents)) == sum(map(len, documents))
    assert len(corpus.train) <= 50
    assert corpus.dropped == 0


def test_what_is_in_the_test_data_is_not_trained_on(tmp_path: Path) -> None:
    known = parallel.read("tiny", "de", "en")
    first = known[0]
    rest = [p for p in known if p.source != first.source and p.target != first.target]
    second = next(p for p in rest if p.source != p.target)
    test = tmp_path / "test.tsv"
    spaced = f"  {first.source.upper().replace(' ', '   ')}"
    test.write_text(f"{spaced}\tnew\nneu\t{second.target.title()}\n", encoding="utf-8")
    corpus = prepare(asked(test_data=str(test), train_pairs=1000), tiny.tokenizer())
    left = [*corpus.train, *corpus.warm, *corpus.development]
    assert first.source not in {p.source for p in left}
    assert second.target not in {p.target for p in left}
    assert corpus.dropped == 2
    assert apart(known, [replace(first, source="x", target="y")]) == known
    test.write_text("\n".join(f"{p.source}\t{p.target}" for p in known), encoding="utf-8")
    with pytest.raises(UserError, match=r"every pair of tiny stands in .*test.tsv"):
        prepare(asked(test_data=str(test), test_pairs=1000), tiny.tokenizer())


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "wanted"),
    [
        (4, 4, 1, (4, 1)),
        (2, 4, 1, (2, 1)),
        (8, 4, 4, (2, 1)),
        (64, 4, 2, (4, 8)),
        (1, 4, 2, (1, 1)),
    ],
)
def test_a_step_takes_as_many_pairs_as_are_asked_for(
    batch: int, micro: int, processes: int, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert _batches(SimpleNamespace(batch_size=batch, micro_batch_size=micro)) == wanted


def test_parts_of_the_training_rows() -> None:
    rows: Any = ["a", "b", "c", "d"]
    flags = [False, True, False, True]
    assert part("all", rows, flags, [], 0.5) == rows
    assert part("clean", rows, flags, [], 0.5) == ["a", "c"]
    assert part("filtered", rows, flags, [0.0, 9, 8, 1], 0.5) == ["a", "d"]
    with pytest.raises(UserError, match="no clean pair of 4 is left to train on; lower --rates"):
        part("clean", rows, [True] * 4, [], 0.9)
    with pytest.raises(UserError, match=r"no filtered pair of 4 .*; lower --filtered-share"):
        part("filtered", rows, flags, [0.0, 9, 8, 1], 0.9)


# ---- self-knowledge -----------------------------------------------------------------------------


def test_tokens_are_measured_as_the_model_counts_them() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    rows = [translation.encode(p, tokenizer, 100) for p in pairs(8)]
    found = tokens(model, rows, batch_size=3, pad=tokenizer.pad_token_id)
    losses = row_losses(found, len(rows))
    for row, loss in zip(rows, losses, strict=True):
        ids = torch.tensor([row.prompt + row.answer])
        labels = torch.tensor([[-100] * len(row.prompt) + row.answer])
        assert loss == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-3)
    few = tokens(model, rows, 3, tokenizer.pad_token_id, temperatures=(1.0,))
    torch.testing.assert_close(few.plain, found.plain)
    assert torch.isinf(few.loss[0]).all()
    assert (found.mass == 1).all()
    assert ((found.certain > 0) & (found.certain < 1)).all()
    corrected = tokens(
        model, rows, 3, tokenizer.pad_token_id, token_loss=SelfCorrectionLoss(), progress=1.0
    )
    assert (corrected.mass <= 1).all()
    assert (corrected.mass < 1).any()


def table(loss: list[list[float]]) -> Tokens:
    values = torch.full((len(TEMPERATURES), len(loss[0])), 9.0)
    for i, row in enumerate(loss):
        values[i] = torch.tensor(row)
    count = len(loss[0])
    return Tokens(torch.arange(count), values, *(torch.zeros(count) for _ in range(4)))


def test_the_temperature_is_chosen_on_development_data() -> None:
    development, test = table([[2.0, 2.0], [1.0, 2.0]]), table([[1.0], [5.0]])
    assert matched(development, test) == (5.0, 0.4)


def test_a_check_parts_noisy_tokens_from_clean_ones() -> None:
    found = Tokens(
        row=torch.tensor([0, 0, 1, 1]),
        loss=torch.tensor([[1.0, 2, 3, 4]]).expand(len(TEMPERATURES), 4),
        norm=torch.tensor([0.0, 3, 1, 2]),
        right=torch.tensor([1.0, 1, 1, 0]),
        mass=torch.tensor([1.0, 0.8, 0.2, 0.4]),
        certain=torch.zeros(4),
    )
    count = 21
    others = replace(table([[7.0] * count] * 8), certain=torch.linspace(0, 1, count))
    point = check(found, [False, True], 0.5, others)
    assert point.development_loss == 7
    range_of_c = point.certainty_low, point.certainty_middle, point.certainty_high
    assert range_of_c == pytest.approx((0.05, 0.5, 0.95))
    assert point.loss_auroc == 1
    assert point.norm_auroc == 0.5
    assert point.noisy_mass == pytest.approx(0.3)
    assert point.clean_mass == pytest.approx(0.9)
    assert point.noisy_right == 0.5
    nothing = check(found, [False, False], 0.5, others)
    assert nothing.loss_auroc is None
    assert nothing.noisy_mass is None


def test_the_best_weights_come_back() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    losses = iter([3.0, 1.0, 2.0])

    def take(_: Any, progress: float) -> Any:
        return SimpleNamespace(progress=progress, development_loss=next(losses))

    watch = Watch(take, 3, remember=True)
    for step in range(1, 10):
        with torch.no_grad():
            model.weight.fill_(step)
        state = SimpleNamespace(global_step=step, max_steps=9)
        watch.on_step_end(None, state, SimpleNamespace(), model=model)
    assert [point.progress for point in watch.found] == pytest.approx([1 / 3, 2 / 3, 1])
    watch.restore(model)
    assert model.weight.item() == 6


def test_what_was_seen_survives_an_interruption(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    tokens_of = replace(table([[7.0] * 4] * 8), certain=torch.ones(4))
    point = check(tokens_of, [False] * 4, 0.5, tokens_of)
    losses = iter([1.0, 2.0])

    def take(_: Any, progress: float) -> Any:
        return replace(point, progress=progress, development_loss=next(losses))

    watch = Watch(take, 4, remember=True)
    assert watch.go_on(tmp_path) is None
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    for step in (1, 2, 3):
        with torch.no_grad():
            model.weight.fill_(step)
        state = SimpleNamespace(global_step=step, max_steps=8)
        watch.on_step_end(arguments, state, SimpleNamespace(), model=model)
        (tmp_path / f"checkpoint-{step}").mkdir()
        watch.on_save(arguments, state, SimpleNamespace())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    again = Watch(take, 4, remember=True)
    assert again.go_on(tmp_path) == str(tmp_path / "checkpoint-3")
    assert again.found == watch.found == [replace(point, progress=0.25, development_loss=1.0)]
    assert again.spent > 0
    again.on_step_end(arguments, SimpleNamespace(global_step=4, max_steps=8), None, model=model)
    again.restore(model)
    assert model.weight.item() == 2


# ---- plan and promises --------------------------------------------------------------------------


def test_promised_arms_run_for_every_seed_and_others_for_some() -> None:
    given = SimpleNamespace(
        tuners=["road", "full"],
        rates=["0.5", "0"],
        arms=["ce", "self", "tau1", "clean"],
        seeds=2,
        side_seeds=1,
    )
    runs = plan(given)
    assert len(set(runs)) == len(runs) == 6 + 4 + 1 + 2
    assert runs[0] == Run("road", 0.5, "ce", 0)
    assert {r.arm for r in runs if r.rate == 0} == {"ce", "self"}
    assert Run("road", 0.5, "clean", 0) in runs
    assert Run("road", 0.5, "clean", 1) not in runs
    assert str(runs[-1]) == "full-0.5-self-0"


def test_what_needs_known_noise_is_refused_without_it() -> None:
    own = {"tuners": ["road"], "rates": ["0"], "seeds": 1, "side_seeds": 1, "filtered_share": None}
    with pytest.raises(UserError, match=r"the arm clean is .* leave it out of --arms"):
        plan(SimpleNamespace(**own, arms=["ce", "clean"]))
    with pytest.raises(UserError, match=r"the arm filtered .* give --filtered-share"):
        plan(SimpleNamespace(**own, arms=["ce", "filtered"]))
    given = SimpleNamespace(**own | {"filtered_share": 0.2}, arms=["ce", "filtered"])
    assert [run.arm for run in plan(given)] == ["ce", "filtered"]
    noisy = SimpleNamespace(**own | {"rates": ["0.5", "0"]}, arms=["clean", "filtered"])
    assert len(plan(noisy)) == 2


def result(arm: str, rate: float, seed: int, **values: Any) -> dict[str, Any]:
    early = {"progress": 0.5, "loss_auroc": 0.7, "noisy_mass": 0.6, "clean_mass": 0.9}
    last = {"progress": 1.0, "loss_auroc": 0.7, "noisy_mass": 0.3, "clean_mass": 0.8}
    own = {"loss": 1.0, "matched_loss": 0.5, "chrf": 50.0, "checks": [early, last]}
    return {"tuner": "road", "rate": rate, "arm": arm, "seed": seed, **own, **values}


def judged(**changes: dict[str, Any]) -> dict[str, bool | None]:
    made = []
    for seed in range(3):
        made += [
            result("ce", 0.5, seed),
            result(
                "self", 0.5, seed, **{"loss": 0.7, "matched_loss": 0.4} | changes.get("own", {})
            ),
            result("tau1", 0.5, seed, **{"loss": 0.9} | changes.get("control", {})),
            result("ce", 0.0, seed, chrf=60.0 + seed),
            result("self", 0.0, seed, **{"chrf": 61.4} | changes.get("clean", {})),
        ]
    return promises(grouped(made), "road", [0.5, 0.0])


def kept(made: dict[str, bool | None], word: str) -> bool | None:
    (found,) = [kept for promise, kept in made.items() if word in promise]
    return found


def test_promises_are_kept_and_broken() -> None:
    good = judged()
    assert all(good.values())
    assert len(good) == 8
    assert verdict(good) == ""


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("S1 test loss", {"own": {"loss": 0.76}}),
        ("S1 matched", {"own": {"matched_loss": 0.5}}),
        ("S1 chrF", {"own": {"chrf": 49.9}}),
        ("S2", {"control": {"loss": 0.6}}),
        ("S3", {"clean": {"chrf": 62.1}}),
        ("AUROC", {"own": {"checks": [{"progress": 0.5, "loss_auroc": 0.6}, {}]}}),
    ],
)
def test_each_promise_can_be_broken(word: str, changes: dict[str, Any]) -> None:
    if "checks" in changes.get("own", {}):
        changes["own"]["checks"][1] = {"progress": 1, "noisy_mass": 0.9, "clean_mass": 0.8}
        assert not kept(judged(**changes), "less is left")
        changes["own"]["checks"][1]["loss_auroc"] = 0.9  # late, which does not count
    assert not kept(judged(**changes), word)


def test_two_failures_of_s1_are_calibration_only() -> None:
    made = judged(own={"matched_loss": 0.6, "chrf": 40.0})
    assert "calibration only" in verdict(made)


def test_promises_wait_for_their_runs() -> None:
    assert set(promises({}, "road", [0.5])) == {"S0 the loss is exact"}
    only = grouped([result("ce", 0.0, 0), result("self", 0.0, 0)])
    assert len(promises(only, "road", [0.5, 0.0])) == 2


def test_data_with_noise_of_its_own_is_not_judged_as_clean() -> None:
    only = grouped([result("ce", 0.0, 0), result("self", 0.0, 0)])
    assert set(promises(only, "road", [0.0])) == {"S0 the loss is exact"}


def test_seeds_without_a_noisy_pair_to_check_are_left_out() -> None:
    nothing = {"loss_auroc": None, "noisy_mass": None, "clean_mass": 0.9}
    unseen = [{"progress": 0.5, **nothing}, {"progress": 1.0, **nothing}]
    ce = [result("ce", 0.05, seed) for seed in range(2)]
    one = grouped([*ce, result("self", 0.05, 0, checks=unseen), result("self", 0.05, 1)])
    assert kept(promises(one, "road", [0.05]), "AUROC") is True
    assert kept(promises(one, "road", [0.05]), "less is left") is True
    none = grouped([*ce, *(result("self", 0.05, seed, checks=unseen) for seed in range(2))])
    assert kept(promises(none, "road", [0.05]), "AUROC") is None
    assert kept(promises(none, "road", [0.05]), "less is left") is None


def test_the_exactness_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exact()
    monkeypatch.setitem(TRUSTED, 0.5, 0.4)
    assert not exact()
