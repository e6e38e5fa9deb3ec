"""The recipe's text, task, promises and runs: parts, windows, masks, going on, bad input."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from recipes_peft import errors
from tests.examples import _recipes
from tests.examples.test_outlier_free_softmax import RECIPE, bert, opt

corpus, pretraining, transfer = RECIPE["corpus"], RECIPE["pretrain"], RECIPE["transfer"]
results, low_bits, toys = RECIPE["results"], RECIPE["low_bits"], RECIPE["toys"]
blimp = RECIPE["blimp"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _recipes.elsewhere(tmp_path, monkeypatch)
    AcceleratorState._reset_state(True)


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    return errors.run(RECIPE["run"].main)


# ---- text -----------------------------------------------------------------------------------


def test_no_text_is_on_both_sides() -> None:
    train, held = (list(texts) for texts in corpus.read(["tiny"], None, 0.25))
    assert train
    assert held
    assert not set(train) & set(held)
    assert len(set(train) | set(held)) == 200


def test_the_articles_of_wikitext_are_read_packed_or_not() -> None:
    text = " \n = Title = \n \n One .\n = = Part = = \n Two .\n = Other = \n Three .\n"
    Path("valid.txt").write_text(text)
    with lzma.open("test.txt.xz", "wt", encoding="utf-8") as file:
        file.write(" = Held = \n Four .\n")
    train, held = (list(texts) for texts in corpus.read(["wikitext2:."], None, 0.1))
    assert [text.split("\n")[0].strip() for text in train if text] == ["= Title =", "= Other ="]
    assert "Two ." in train[-2]
    assert held == ["= Held = \n Four ."]
    Path("test.txt.xz").unlink()
    with pytest.raises(errors.UserError, match=r"holds no test\.txt"):
        list(corpus.read(["wikitext2:."], None, 0.1)[1])


def test_windows_are_the_tokens_in_order_across_shards() -> None:
    tokenizer = corpus.make_tokenizer("bytes", [])
    texts = ["abcdefg", "hij", "é"]
    corpus.write_tokens(texts, tokenizer, Path("tokens"), None, shard=6)
    assert sorted(p.name for p in Path("tokens").iterdir()) == [
        f"0000{i}.safetensors" for i in range(3)
    ]
    windows = corpus.Windows(Path("tokens"), 4, tokenizer.cls_token_id)
    decoded = [tokenizer.decode(windows[i]) for i in range(len(windows))]
    first, end = tokenizer.cls_token, tokenizer.sep_token
    assert [text.replace(" ", "") for text in decoded] == [
        f"{first}abc", f"{first}def", f"{first}g{end}h", f"{first}ij{end}",
        f"{first}é{end}",
    ]  # fmt: skip
    with pytest.raises(IndexError):
        windows[5]
    corpus.write_tokens(texts, tokenizer, Path("few"), 5)
    assert len(corpus.Windows(Path("few"), 2, 2)) == 5
    with pytest.raises(errors.UserError, match="fills no window of 64"):
        corpus.Windows(Path("few"), 64, 2)
    with pytest.raises(errors.UserError, match="there is no text"):
        corpus.write_tokens([], tokenizer, Path("none"), None)


def test_a_vocabulary_is_learned_and_loses_nothing() -> None:
    tokenizer = corpus.make_tokenizer("bpe:280", ["low lower lowest"] * 9)
    assert 261 < len(tokenizer) <= 280
    assert tokenizer.mask_token_id is not None
    assert tokenizer.decode(tokenizer("lower ñ").input_ids) == "lower ñ"
    assert len(tokenizer("lower").input_ids) < 5
    with pytest.raises(errors.UserError, match="write bpe:SIZE"):
        corpus.make_tokenizer("bpe:many", [])


def test_masks_are_the_same_with_a_seed_and_leave_torch_alone() -> None:
    tokenizer = corpus.make_tokenizer("bytes", [])
    rows = [[2, *range(10, 73)] for _ in range(40)]
    join = corpus.masked(tokenizer, 0.15, seed=3)
    torch.manual_seed(5)
    one = join(rows)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(one["labels"], join(rows)["labels"])
    chosen = one["labels"] != -100
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert not chosen[:, 0].any()  # the first token is special
    shown = one["input_ids"][chosen]
    assert (shown == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.06)
    assert torch.equal(one["input_ids"][~chosen], torch.tensor(rows)[~chosen])


def test_the_loss_is_the_mean_over_predicted_tokens() -> None:
    class Model(torch.nn.Module):
        config = SimpleNamespace(model_type="bert")
        device = torch.device("cpu")

        def forward(self, labels: Any) -> Any:
            return SimpleNamespace(loss=labels[labels != -100].float().mean())

    batches = [{"labels": torch.tensor([[1, -100, 3]])}, {"labels": torch.tensor([[8, -100]])}]
    none = [{"labels": torch.tensor([[-100, -100]])}]
    assert pretraining.loss(Model(), batches + none) == pytest.approx(4)


# ---- task -----------------------------------------------------------------------------------


def short_text() -> Any:
    tokenizer = corpus.make_tokenizer("bytes", [])
    for part in ("train", "held"):
        corpus.write_tokens([f"{part} {i} text" for i in range(60)], tokenizer, Path(part), None)
    return pretraining.Text(tokenizer, Path("train"), Path("held"))


def task_settings(**changes: Any) -> Any:
    given = {"task": "scrambled", "task_length": 12, "task_rows": 20, "task_held_out": 8, "seed": 0}
    return SimpleNamespace(**{**given, **changes})


def test_every_other_text_is_scrambled_and_lengths_differ() -> None:
    text = short_text()
    task = transfer.read(task_settings(), text)
    assert (len(task.train), len(task.held_out)) == (20, 8)
    assert [label for _, label in task.train] == [0, 1] * 10
    windows = text.windows("train", 12)
    beginnings = [windows[i] for i in range(len(windows))]
    for ids, label in task.train:
        whole = any(window[: len(ids)] == ids for window in beginnings)
        same = any(sorted(window[: len(ids)]) == sorted(ids) for window in beginnings)
        assert same
        assert whole == (not label)
    assert len({len(ids) for ids, _ in task.train}) > 1
    batch = transfer.collate([([2, 5, 6], 1), ([2], 0)], 0)
    assert batch["input_ids"].tolist() == [[2, 5, 6], [2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_tasks_of_files_have_the_classes_of_their_answers() -> None:
    rows = [{"prompt": f"text number {i}", "answer": "ab"[i % 2]} for i in range(20)]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = short_text()
    task = transfer.read(task_settings(task="own.jsonl"), text)
    assert task.classes == ["a", "b"]
    assert len(task.held_out) == 5
    assert all(len(ids) == 12 and ids[0] == 2 for ids, _ in task.train)
    Path("train.csv").write_text('text,category\n"lost, stolen",card\nrate,money\n')
    Path("test.csv").write_text("text,category\nlost,card\nnew,other\n")
    task = transfer.read(task_settings(task="banking77:."), text)
    assert task.classes == ["card", "money"]
    assert len(task.held_out) == 1  # a class that is not in training is left out
    Path("one.jsonl").write_text("\n".join(json.dumps({**r, "answer": "a"}) for r in rows))
    with pytest.raises(errors.UserError, match="has 1 classes"):
        transfer.read(task_settings(task="one.jsonl"), text)
    with pytest.raises(errors.UserError, match=r"holds no train\.csv"):
        transfer.read(task_settings(task="banking77:nowhere"), text)


def test_a_data_set_on_disk_is_a_task() -> None:
    from datasets import Dataset

    rows = {"sentence": [f"film {i}" for i in range(16)], "label": [0, 1] * 8}
    Dataset.from_dict(rows).save_to_disk("sst2")
    Dataset.from_dict({"text": ["a"]}).save_to_disk("other")
    text = short_text()
    assert transfer.read(task_settings(task="disk:sst2"), text).classes == ["0", "1"]
    with pytest.raises(errors.UserError, match="needs one named label"):
        transfer.read(task_settings(task="disk:other"), text)
    with pytest.raises(errors.UserError, match="cannot read the data set"):
        transfer.read(task_settings(task="disk:nowhere"), text)


# ---- minimal pairs --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("make", [bert, opt])
def test_likelihoods_are_sums_of_logarithms_of_probabilities(make: Any) -> None:
    model = make()
    words = SimpleNamespace(pad_token_id=0, mask_token_id=4)
    text = pretraining.Text(words, Path(), Path())
    sentences = [[2, 7, 9, 11], [2, 8]]
    found = blimp.likelihood(model, sentences, text)
    for ids, value in zip(sentences, found, strict=True):
        total = 0.0
        for place in range(1, len(ids)):
            if make is opt:
                logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
            else:
                hidden = [4 if i == place else token for i, token in enumerate(ids)]
                logits = model(input_ids=torch.tensor([hidden])).logits[0, place]
            total += logits.log_softmax(-1)[ids[place]].item()
        assert value == pytest.approx(total, abs=1e-3)
    better = sorted(sentences, key=lambda ids: -found[sentences.index(ids)])
    pairs = {"a": [tuple(better)], "b": [tuple(better), tuple(reversed(better))]}
    assert blimp.accuracy(model, pairs, text) == 0.75


def test_pairs_that_fit_are_read() -> None:
    rows = [{"sentence_good": "a" * n, "sentence_bad": "b"} for n in (3, 99, 4)]
    with lzma.open("island.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))
    text = short_text()
    found = blimp.read(Path(), 5, text, 16)
    assert {name: len(pairs) for name, pairs in found.items()} == {"island": 2}
    assert found["island"][0][1] == [2, *text.tokenizer("b").input_ids]
    with pytest.raises(errors.UserError, match="no pair of sentences of at most 2"):
        blimp.read(Path(), 5, text, 2)


# ---- runs -----------------------------------------------------------------------------------

SMALL = ("--smoke", "--bert-steps", "1", "--opt-steps", "1", "--task-steps", "1")


def test_all_stages_run_and_a_second_call_makes_nothing_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quick(variant: Any) -> Any:  # the toys have a test of their own
        return toys_before(variant, (1, 2, 3, 4), length=8)

    toys_before = toys.no_op_head
    monkeypatch.setattr(toys, "no_op_head", quick)
    more = ("--opt-arms", "cs", "vanilla", "--bert-arms", "cs", "vanilla", "--once", "gated")
    more += ("--families", "bert", "opt")
    more += ("--transferred", "cs", "cs>ncs", "--tuners", "road", "head", "--quantized", "cs")
    assert run(monkeypatch, *SMALL, *more) == 0
    found = json.loads(Path("demo-output/results.json").read_text())
    assert set(found["runs"]["measure"]) == {
        f"{family} {arm}" for family in ("bert", "opt") for arm in ("cs", "vanilla", "gated")
    }
    cs = found["runs"]["measure"]["bert cs"][0]
    assert cs["lengths"]["16"] == pytest.approx(cs["swapped"]["16"], abs=1e-4)
    assert set(found["runs"]["measure"]["opt vanilla"][0]["injected"]) == {"1", "200"}
    tuned = found["runs"]["transfer"]
    assert set(tuned) == {
        f"{family} {arm} {tuner}"
        for family in ("bert", "opt") for arm in ("cs", "cs>ncs") for tuner in ("road", "head")
    }  # fmt: skip
    assert all(r[0]["reloaded"] <= 1e-5 for n, r in tuned.items() if n.endswith("road"))
    assert tuned["opt cs head"][0]["trained"] < tuned["opt cs road"][0]["trained"]
    assert set(found["runs"]["apiq"]) == {
        f"{family} cs 2 {start}" for family in ("bert", "opt") for start in low_bits.STARTS
    }
    assert found["promises"]["opt: decoding with a cache is the full forward pass"]
    for name in ("curves.png", "curves.csv", "lengths.png", "measure.csv", "transfer.csv"):
        assert Path("demo-output", name).exists()
    kept = {p: p.stat().st_mtime_ns for p in Path("demo-output").glob("*-*/**/*") if p.is_file()}
    assert not [p for p in kept if p.suffix in (".bin", ".pt", ".pkl", ".progress")]
    assert run(monkeypatch, *SMALL, *more, "--stages", "measure", "transfer", "apiq") == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert "yes  opt: decoding with a cache" in capsys.readouterr().out


BAD = {
    "arm": (["--opt-arms", "best"], "choose from vanilla, cs, ncs"),
    "length": (["--lengths", "99"], "windows have 2 to 16 tokens"),
    "bits": (["--bits", "two"], "give whole numbers above zero"),
    "gamma": (["--bert-gamma", "0.1"], "bert_gamma is 0.1; it must be 0 or below"),
    "lengths": (["--lengths", "4", "8"], "lengths has no 16"),
    "data": (["--data", "nowhere.jsonl", "--stages", "pretrain"], "cannot read the data"),
    "gate": (["--gate", "cubic"], "choose from linear, mlp, heads"),
}


@pytest.mark.parametrize(("argv", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *SMALL, *argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line


# ---- promises -------------------------------------------------------------------------------


def test_promises_are_kept_and_broken_by_numbers() -> None:
    def record(loss: float, **more: Any) -> list[Any]:
        return [{"loss": loss, **more}]

    lengths = ["4", "64"]
    good = {
        "opt vanilla": record(2.0, decoding=0.0, injected={"1": 2.01, "200": 2.5}),
        "opt ncs-a": record(2.02 - 1e-9),
        "bert cs": record(3.0, lengths={"4": 3.1, "64": 3.0}, swapped={"4": 3.0, "64": 3.00005}),
    }
    tuned = {
        "bert cs road": record(0.6, reloaded=1e-6),
        "bert ncs road": record(0.5, reloaded=0.0),
    }
    low = {"opt cs 2 rounded": [{"a32": 4.0}], "opt cs 2 apiq": [{"a32": 3.0}]}
    found = {"measure": good, "transfer": tuned, "apiq": low}
    assert len(results.promised(found, lengths)) == 10
    assert all(results.promised(found, lengths).values())
    bad = {
        "opt vanilla": record(2.0, decoding=1.0, injected={"1": 2.1, "200": 2.4}),
        "opt ncs-a": record(2.1),
        "bert cs": record(3.0, lengths={"4": 3.0, "64": 3.0}, swapped={"4": 3.1, "64": 3.1}),
    }
    tuned = {
        "bert cs road": record(0.5, reloaded=1.0),
        "bert ncs road": record(0.6, reloaded=0.0),
    }
    low = {"opt cs 2 rounded": [{"a32": 3.0}], "opt cs 2 apiq": [{"a32": 4.0}]}
    found = {"measure": bad, "transfer": tuned, "apiq": low}
    assert not any(results.promised(found, lengths).values())
    assert results.promised({}, lengths) == {}


def test_promises_about_toys() -> None:
    sums = {"cs": [1.0, 0.1], "ncs": [0.3, 0.29], "ncs-a": [1.0, 1.0]}
    heads = {"softmax": [(5.0, 1e-4), (6.0, 0.0), (7.0, 0.0), (8.0, 0.0)]}
    heads["ncs-half"] = [(4.0, 0.0)] * 4
    assert all(toys.promised(sums, heads).values())
    sums = {"cs": [1.0, 0.5], "ncs": [0.3, 0.1], "ncs-a": [1.0, 1.0]}
    heads = {"softmax": [(5.0, 0.0)] * 4, "ncs-half": [(4.0, 0.0)] * 3 + [(4.1, 0.1)]}
    assert not any(toys.promised(sums, heads).values())
