"""The recipe's data, training and runs: no leak, one task to a batch, promises, going on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from recipes_peft import errors
from recipes_peft.parallel import Pair
from tests.examples.test_neuron_specialization import RECIPE, tiny_model

arms, directions, masking = RECIPE["arms"], RECIPE["directions"], RECIPE["masking"]
results, translator = RECIPE["results"], RECIPE["translator"]
OUT, BACK = directions.Task("en", "fr", "en"), directions.Task("fr", "en", "en")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    AcceleratorState._reset_state(True)  # or no test could choose another precision


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(RECIPE["run"].main)


# ---- data -----------------------------------------------------------------------------------


def test_a_task_has_a_kind_and_a_language() -> None:
    assert (OUT.name, OUT.kind, OUT.language) == ("en-fr", "from", "fr")
    assert (BACK.name, BACK.kind, BACK.language) == ("fr-en", "to", "fr")


def tiny_parts(**changes: Any) -> Any:
    given = {"valid_data": None, "test_data": None, "valid_rows": 12, "test_rows": 8, "seed": 0}
    return directions.parts("en", ["fr", "sv"], "tiny", **{**given, **changes})


def test_documents_stand_on_one_side_in_all_languages() -> None:
    found = tiny_parts()
    documents = [
        {pair.document for pairs in part.values() for pair in pairs}
        for part in (found.train, found.valid, found.test)
    ]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    assert list(found.test) == [
        directions.Task(*sides, "en")
        for sides in (("en", "fr"), ("en", "sv"), ("fr", "en"), ("sv", "en"))
    ]
    assert all(0 < len(pairs) <= 8 for pairs in found.test.values())
    out, back = found.train[OUT][0], found.train[BACK][0]
    assert (out.source, out.target) == (back.target, back.source)
    assert (back.source_language, back.target_language) == ("fr", "en")


def test_what_is_tested_is_not_trained_in_that_direction() -> None:
    lines = "".join(f"{i % 11}\tt{i}\tdocument {i}\n" for i in range(60))
    Path("pairs.tsv").write_text(lines)
    found = directions.parts(
        "en", ["fr"], "{source}.tsv".replace("{source}", "pairs"), None, None, 5, 5, 0
    )
    for task in (OUT, BACK):
        tested = {text for pair in found.test[task] for text in (pair.source, pair.target)}
        trained = {text for pair in found.train[task] for text in (pair.source, pair.target)}
        assert tested
        assert trained
        assert not tested & trained


def test_files_are_named_by_languages_and_other_sets_are_read() -> None:
    for name in ("train", "test"):
        Path(f"{name}.en-fr.tsv").write_text(f"{name} a\tun\n{name} b\tdeux\n{name} c\ttrois\n")
    found = directions.parts(
        "en", ["fr"], "train.{source}-{target}.tsv", None, "test.{source}-{target}.tsv", 1, 2, 0
    )
    assert len(found.test[OUT]) == 2
    assert all(pair.source.startswith("test") for pair in found.test[OUT])
    with pytest.raises(errors.UserError, match="cannot read"):
        directions.parts("en", ["de"], "train.{source}-{target}.tsv", None, None, 1, 1, 0)


@pytest.fixture(scope="module")
def coded() -> Any:
    found = tiny_parts()
    texts = [text for pairs in found.train.values() for p in pairs for text in (p.source, p.target)]
    tokenizer = directions.make_tokenizer(texts, ["en", "fr", "sv"], 200)
    return tokenizer, directions.encode(found.train, tokenizer, 24)


def test_rows_begin_with_tags_and_end_and_decode(coded: Any) -> None:
    tokenizer, rows = coded
    row = rows[OUT][0]
    assert tokenizer.convert_ids_to_tokens([row.source[0], row.target[0]]) == ["__en__", "__fr__"]
    assert row.source[-1] == row.target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.target, skip_special_tokens=True) == row.pair.target
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<pad>", "</s>")] == [0, 1, 2]
    with pytest.raises(errors.UserError, match="no pair of 3 tokens a side"):
        directions.encode({OUT: [row.pair]}, tokenizer, 3)
    with pytest.raises(errors.UserError, match="no tag for 'de', neither __de__ nor de"):
        directions.encode({directions.Task("en", "de", "en"): [row.pair]}, tokenizer, 9)


def test_the_decoder_is_given_the_tag_and_learns_the_rest() -> None:
    pair = Pair("a", "b", "en", "fr", "")
    rows = [directions.Row([5, 8, 2], [6, 9, 10, 2], pair), directions.Row([5, 2], [6, 2], pair)]
    batch = directions.collate(rows, 1, 2)
    assert batch["input_ids"].tolist() == [[5, 8, 2], [5, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[2, 6, 9, 10], [2, 6, 1, 1]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 9, 10, 2], [-100, 2, -100, -100]]


def test_a_stream_has_batches_of_one_task_at_its_share(coded: Any) -> None:
    _, rows = coded
    rows = {OUT: rows[OUT][:64], BACK: rows[BACK][:2]}
    seen = {OUT: 0, BACK: 0}
    for task, batch in islice(directions.stream(rows, 40, 5.0, 0), 600):
        seen[task] += 1
        assert all(row in rows[task] for row in batch)
        assert len(batch) * max(len(side) for row in batch for side in row[:2]) <= 40
    assert seen[OUT] / seen[BACK] == pytest.approx(2, rel=0.25)  # 32 to the power 1/5
    first = list(islice(directions.stream(rows, 40, 5.0, 1), 20))
    assert first == list(islice(directions.stream(rows, 40, 5.0, 1), 20))
    # within a round every row of a task comes once
    alone = directions.stream({OUT: rows[OUT]}, 40, 5.0, 0)
    count, order = 0, []
    while count < 64:
        batch = next(alone)[1]
        count, order = count + len(batch), order + batch
    assert sorted(map(id, order)) == sorted(map(id, rows[OUT]))


# ---- training and measuring -----------------------------------------------------------------


def training(**changes: Any) -> Any:
    given = {
        "steps": 30, "learning_rate": 1e-2, "warmup": 5, "batch_tokens": 200, "accumulation": 2,
        "temperature": 1.0, "label_smoothing": 0.1, "evaluate_every": 10, "patience": 9, "seed": 0,
    }  # fmt: skip
    return translator.Training(**{**given, **changes})


def trained(coded: Any, **changes: Any) -> Any:
    tokenizer, rows = coded
    torch.manual_seed(0)
    model = translator.make_model(len(tokenizer), 1, 32, 64, 2, 0.0, 32)
    points = translator.train(
        Accelerator(), model, {OUT: rows[OUT]}, {OUT: rows[OUT][:8]}, training(**changes), "test",
        arms.dense, arms.no_extra,
    )  # fmt: skip
    return model, points


def test_training_learns_and_keeps_the_best(coded: Any) -> None:
    tokenizer, rows = coded
    model, points = trained(coded)
    assert [point.step for point in points] == [10, 20, 30]
    assert points[-1].held_out_loss < points[0].held_out_loss - 0.2
    total, tokens = translator.nll(model, rows[OUT][:8], "en-fr", 60, arms.dense, arms.no_extra)
    assert tokens == sum(len(row.target) - 1 for row in rows[OUT][:8])
    assert total / tokens == pytest.approx(min(p.held_out_loss for p in points), rel=1e-4)
    # a batch of another size has the same loss
    again = translator.nll(model, rows[OUT][:8], "en-fr", 1000, arms.dense, arms.no_extra)[0]
    assert again == pytest.approx(total, rel=1e-4)
    shape = (1, 8, 3)
    texts = translator.translate(
        model, tokenizer, rows[OUT][:5], "en-fr", *shape, arms.dense, arms.no_extra
    )
    one = translator.translate(
        model, tokenizer, rows[OUT][3:4], "en-fr", *shape, arms.dense, arms.no_extra
    )
    assert texts[3] == one[0]  # in the order given


def test_training_ends_when_nothing_gets_better(coded: Any) -> None:
    _, points = trained(coded, learning_rate=1e-30, steps=8, evaluate_every=1, patience=2)
    assert [point.step for point in points] == [1, 2, 3]


def interrupted(coded: Any, stop: int, **changes: Any) -> Any:
    """Train on two tasks, with dropout, until so many batches were seen in training."""
    tokenizer, rows = coded
    torch.manual_seed(0)
    model = translator.make_model(len(tokenizer), 1, 32, 64, 2, 0.2, 32)
    seen: list[str] = []

    @contextmanager
    def active(task: str) -> Iterator[None]:
        if model.training:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(task)
        yield

    both, own = {task: rows[task] for task in (OUT, BACK)}, changes.pop("own", {})
    points = translator.train(
        Accelerator(), model, both, {OUT: rows[OUT][:8]}, training(**changes), "test",
        active, arms.no_extra, **own,
    )  # fmt: skip
    numbers = [(p.step, p.train_loss, p.held_out_loss) for p in points]
    return numbers, [p.detach() for p in model.parameters()], seen


def test_an_interrupted_training_ends_with_the_same_numbers(coded: Any, tmp_path: Path) -> None:
    how = {"steps": 9, "evaluate_every": 2, "learning_rate": 3e-2}
    file = tmp_path / "base-unfinished.safetensors"
    numbers, weights, seen = interrupted(coded, 99, **how)
    assert set(seen) == {"en-fr", "fr-en"}
    with pytest.raises(KeyboardInterrupt):  # in the sixth step, two batches of which a step has
        interrupted(coded, 11, **how, own={"saved": file, "save_every": 0})
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    again, same, rest = interrupted(coded, 99, **how, own={"saved": file, "save_every": 0})
    assert again == numbers
    assert rest == seen[8:]
    assert all(torch.equal(a, b) for a, b in zip(same, weights, strict=True))
    # from the end nothing is left to do, and the best is still known
    again, same, rest = interrupted(coded, 0, **how, own={"saved": file})
    assert (again, rest) == (numbers, [])
    assert all(torch.equal(a, b) for a, b in zip(same, weights, strict=True))


def test_a_training_that_had_ended_is_not_gone_on_with(coded: Any, tmp_path: Path) -> None:
    how = {"learning_rate": 1e-30, "steps": 8, "evaluate_every": 1, "patience": 2}
    own = {"saved": tmp_path / "base.safetensors", "save_every": 0}
    numbers = interrupted(coded, 99, **how, own=own)[0]
    assert [step for step, *_ in numbers] == [1, 2, 3]
    assert interrupted(coded, 0, **how, own=own)[0] == numbers


@pytest.mark.parametrize("tuner", ["road", "road-pair", "road-family", "lora"])
def test_an_adapter_learns_from_its_own_tasks_alone(tuner: str, coded: Any) -> None:
    rows = {OUT: coded[1][OUT]}
    given = SimpleNamespace(
        group_size=32, rank=2, families=[], road_learning_rate=1e-2, lora_learning_rate=1e-2
    )
    model = tiny_model()
    model.resize_token_embeddings(len(coded[0]))
    other = directions.Task("en", "sv", "en")
    tuned = arms.TUNERS[tuner](model, given, [other, OUT, BACK], [])
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    how = training(steps=3, learning_rate=1e-2)
    with arms.gated(tuned.model, "dense", None, None, 0, "kept") as active:
        translator.train(Accelerator(), tuned.model, rows, rows, how, "t", active, tuned.extra)
    moved = {n for n, p in tuned.model.named_parameters() if not torch.equal(p, before[n])}
    own = {"road-pair": "en-fr", "road-family": "fr"}.get(tuner, "default")
    assert moved
    assert all(f".{own}" in name for name in moved)
    with torch.no_grad():
        found = translator.mean_loss(tuned.model, rows, 200, active, tuned.extra)
        base = translator.mean_loss(tuned.model.unload(), rows, 200, active, arms.no_extra)
    assert found < base


def test_counts_of_tasks_add_up_over_processes(coded: Any) -> None:
    model, rows = tiny_model(), {OUT: coded[1][OUT][:6]}
    model.resize_token_embeddings(len(coded[0]))
    found = translator.count(Accelerator(), model, rows, 30, False, arms.no_extra)

    class Part:
        num_processes = 2

        def __init__(self, index: int) -> None:
            self.process_index = index

        def reduce(self, counts: Any, how: str) -> Any:
            return counts

    parts = [translator.count(Part(i), model, rows, 30, False, arms.no_extra) for i in (0, 1)]
    assert found.tasks == ("en-fr",)
    for name, counts in (parts[0] + parts[1]).layers.items():
        assert counts.sum() > 0
        assert torch.equal(counts, found.layers[name])


# ---- runs -----------------------------------------------------------------------------------

SMALL = ("--smoke", "--steps", "2", "--arm-steps", "1", "--languages", "es", "fr")
SMALL += ("--max-length", "12", "--translated", "1")


def test_every_arm_runs_and_a_second_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["full", "full+ns", "full+random", "full+shuffled", "full+lass", "road+ns"]
    names += ["road-pair+ns", "lora+random", "apiq+ns"]
    assert run(monkeypatch, *SMALL, "--seeds", "2", "--arms", *names[:2]) == 0
    (work,) = Path("demo-output").glob("work-*")
    first = {path.name: path.stat().st_mtime_ns for path in work.glob("full*.json")}
    assert len(first) == 4
    assert run(monkeypatch, *SMALL, "--seeds", "1", "--arms", *names) == 0
    assert [path.name for path in Path("demo-output").glob("work-*")] == [work.name]
    assert all(work.joinpath(name).stat().st_mtime_ns == time for name, time in first.items())

    found = json.loads(Path("demo-output/results.json").read_text())
    assert list(found["runs"]) == names
    assert set(found["base"]) == {"en-es", "en-fr", "es-en", "fr-en"}
    signed = {"chrf_signature", "bleu_signature"}
    for runs in found["runs"].values():
        assert set(runs[0]["scores"]["en-fr"]) == {"nll", "chrf", "bleu", *signed}
        assert "nc:6|nw:2" in runs[0]["scores"]["en-fr"]["chrf_signature"]
        assert runs[0]["scores"]["en-fr"]["nll"] > 0
    assert found["runs"]["apiq+ns"][0]["same_as_base"] <= 1
    assert found["runs"]["full+ns"][0]["same_as_base"] == 1
    exact = [met for promise, met in found["promises"].items() if "no difference" in promise]
    assert exact == [True] * 4
    road = found["runs"]["road+ns"][0]["trained"]
    assert found["runs"]["road-pair+ns"][0]["trained"] == 4 * road
    for name in ("scores.csv", "overlap.csv", "overlap.png", "sparsity.csv", "curves.png"):
        assert Path("demo-output", name).exists()
    masks = masking.load(Path("demo-output/masks.safetensors"))
    assert masks.tasks == ("en-es", "en-fr", "es-en", "fr-en")
    assert (work / "models" / "apiq+ns" / "adapter_model.safetensors").exists()
    assert (work / "models" / "apiq+ns" / "masks.safetensors").exists()
    assert not [path for path in work.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    assert not (work / "full+lass-0").exists()
    assert "chrF++" in capsys.readouterr().out


def test_a_run_goes_on_from_where_a_training_was(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = (*SMALL, "--steps", "4", "--arm-steps", "4", "--evaluate-every", "2")
    argv += ("--arms", "full+lass", "--seeds", "1")
    assert run(monkeypatch, *argv, "--out", "whole") == 0
    train = translator.train
    # at the second evaluation of the base, at LaSS's third task, at the second one of the arm
    for name, left in (
        ("base", "base-unfinished.safetensors"),
        ("LaSS, es-en", "full+lass-0"),
        ("full+lass, seed 0", "full+lass-0-unfinished.safetensors"),
    ):

        def stopped(*given: Any, name: str = name) -> Any:
            if given[5] != name:
                return train(*given)
            seen: list[str] = []

            def active(task: str) -> Any:
                seen.append(task)
                if name.startswith("LaSS") or len(seen) > 10:  # in training and in evaluation
                    raise KeyboardInterrupt
                return given[6](task)

            return train(*given[:6], active, *given[7:], save_every=0)

        monkeypatch.setattr(translator, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, *argv)
        (work,) = Path("demo-output").glob("work-*")
        assert (work / left).exists()
    asked: list[str] = []

    def noted(*given: Any) -> Any:
        asked.append(given[5])
        return train(*given)

    monkeypatch.setattr(translator, "train", noted)
    assert run(monkeypatch, *argv) == 0
    assert asked == ["full+lass, seed 0"]  # base and sub-networks were there
    names = [path.name for path in work.iterdir()]
    assert not [name for name in names if "unfinished" in name or name == "full+lass-0"]
    found, whole = (
        json.loads(Path(out, "results.json").read_text())["runs"]["full+lass"][0]
        for out in ("demo-output", "whole")
    )
    assert found["scores"] == whole["scores"]


def test_translations_are_scored_with_comet_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def comet(checkpoint: Path, *sides: Any) -> float:
        asked.append((checkpoint, *map(len, sides)))
        return 0.75

    monkeypatch.setattr(RECIPE["run"].translation, "comet", comet)
    assert run(monkeypatch, *SMALL, "--arms", "road", "--comet", "a.ckpt") == 0
    assert asked == [(Path("a.ckpt"), 1, 1, 1)] * 8  # 4 directions of the base, and of the arm
    found = json.loads(Path("demo-output/results.json").read_text())
    assert found["base"]["en-fr"]["comet"] == 0.75
    assert (
        Path("demo-output/scores.csv").read_text().split()[0] == "arm,seed,task,nll,chrf,bleu,comet"
    )
    assert "COMET" in capsys.readouterr().out


def test_the_settings_of_the_paper_run_on_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "data": "tiny", "vocabulary": 300, "layers": 1, "width": 32, "ffn": 64, "heads": 2,
        "steps": 1, "arm_steps": 1, "lass_steps": 1, "batch_tokens": 60, "group_size": 32,
        "valid_rows": 8, "validated": 4, "test_rows": 4, "translated": 1, "max_length": 12,
        "precision": "bf16", "accumulation": 2,
    }  # fmt: skip
    argv = [word for k, v in small.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    chosen = ("--languages", "de", "nl", "ru", "--arms", "full+ns", "full+lass", "road-family")
    assert run(monkeypatch, "--paper", *argv, *chosen) == 0
    found = json.loads(Path("demo-output/results.json").read_text())
    assert found["settings"]["beams"] == 5
    assert found["settings"]["k_from_decoder"] == 95
    assert list(found["runs"]) == ["full+ns", "full+lass", "road-family"]
    # de and nl are one family; 2 attentions more, and one block, on the side of the decoder
    road = sum([4 * 32 + 64 + 32, 8 * 32 + 64 + 32])
    assert found["runs"]["road-family"][0]["trained"] == 2 * road
    # a trained model is a base
    (base,) = Path("demo-output").glob("work-*/base")
    argv[1] = "tiny"
    taken = ("--model", str(base), "--out", "other", "--bias", "masked", "--count", "positions")
    assert run(monkeypatch, "--paper", *argv, *chosen[:4], "--arms", "full+ns", *taken) == 0
    assert not list(Path("other").glob("work-*/base"))


BAD = {
    "arm": (["--arms", "full+best"], "there is no arm 'full+best'"),
    "lass": (["--arms", "road+lass"], "lass with full only"),
    "k": (["--k-from-decoder", "101"], "k_from_decoder is 101.0; it is a percentage"),
    "bias": (["--bias", "none"], "choose from kept, masked"),
    "twice": (["--languages", "fr", "fr"], "a language stands twice in en, fr, fr"),
    "data": (["--data", "nowhere.tsv"], "cannot read nowhere.tsv"),
    "model": (["--model", "nobody/nothing"], "cannot load the vocabulary of nobody/nothing"),
    "group": (["--group-size", "48", "--arms", "road"], "road does not fit"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(monkeypatch, *SMALL, *argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line


# ---- promises -------------------------------------------------------------------------------


def runs_of(**losses: list[float]) -> Any:
    names = {"dense": "full", "ns": "full+ns", "random": "full+random"}
    return {
        names[arm]: [
            {"scores": {t.name: {"nll": x, "chrf": 50 - x, "bleu": 0.0} for t in (OUT, BACK)}}
            for x in values
        ]
        for arm, values in losses.items()
    }


@pytest.mark.parametrize(
    ("ns", "kept", "said"),
    [
        ([1, 1, 9], [True, True, False], "A negative result at this scale"),
        ([1, 1, 1], [True, True, True], "The method works here"),
        ([2.5, 2.5, 2.5], [True, False, True], "regularisation, not specialization"),
        ([9, 9, 1], [False, False, False], "A negative result at this scale"),
    ],
)
def test_promises_about_the_method(ns: list[float], kept: list[bool], said: str) -> None:
    runs = runs_of(dense=[3, 3, 3], ns=ns, random=[2, 2, 2])
    found = results.promised(runs, [OUT, BACK])
    assert list(found.values()) == kept
    assert said in results.verdict({"modular": True}, found)
    assert "Neurons are not specific enough" in results.verdict(
        {"modular": False}, dict.fromkeys(found, False)
    )
    del runs["full+random"]
    assert len(results.promised(runs, [OUT, BACK])) == 2
    assert "needed to judge" in results.verdict({}, results.promised(runs, [OUT, BACK]))
