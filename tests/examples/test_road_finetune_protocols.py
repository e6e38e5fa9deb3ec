"""The protocols of the RoAd comparison: counts of parameters, metrics, cuts, prompts, answers."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from recipes_peft import tiny
from recipes_peft.errors import UserError
from tests.examples import _recipes


@pytest.fixture
def recipe() -> Iterator[SimpleNamespace]:
    with _recipes.beside("road_finetune") as modules:
        yield modules


# ---- parameters ---------------------------------------------------------------------------------


def roberta(size: str) -> Any:
    wide = size == "large"
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            hidden_size=1024 if wide else 768,
            intermediate_size=4096 if wide else 3072,
            num_hidden_layers=24 if wide else 12,
            num_attention_heads=16 if wide else 12,
        )
    )


def llama_7b() -> Any:
    return LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B


# RoAd's from the table of the specification; the others by hand: LoRA of rank 8 on queries and
# values, (IA)3 on keys, values and the inner features, all biases.
ROBERTA = {
    "base": {
        "base": 0,
        "road_1": 82_944,
        "road_2": 2 * 82_944,
        "road_4": 4 * 82_944,
        "lora": 12 * 2 * 8 * (768 + 768),
        "ia3": 12 * (768 + 768 + 3072),
        "bitfit": 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768,
        "full": 124_055_040,
    },
    "large": {"road_1": 221_184, "road_4": 884_736, "lora": 786_432},
}


@pytest.mark.parametrize(
    ("size", "arm"), [(size, arm) for size, arms in ROBERTA.items() for arm in arms]
)
def test_counts_on_roberta(recipe: Any, size: str, arm: str) -> None:
    with torch.device("meta"):
        model = roberta(size)
        body = sum(p.numel() for p in model.roberta.parameters())
        added = recipe.finetune_arms.ARMS[arm].add(model, "SEQ_CLS", 64, 8)
    found = recipe.finetune_arms.count(added)
    hidden = 768 if size == "base" else 1024
    assert found.trained == (body if arm == "full" else ROBERTA[size][arm])
    assert found.head == hidden * hidden + hidden + 2 * hidden + 2
    assert found.model == body + found.head
    assert found.share == pytest.approx(100 * found.trained / body)


def test_the_shares_are_those_that_the_paper_prints(recipe: Any) -> None:
    body = 124_055_040
    shares = {arm: round(100 * n / body, 2) for arm, n in ROBERTA["base"].items()}
    printed = {"road_1": 0.07, "lora": 0.24, "ia3": 0.04, "bitfit": 0.08}
    assert {arm: shares[arm] for arm in printed} == printed


@pytest.mark.parametrize(
    ("arm", "trained", "percent"),
    [
        ("road_1", 1_359_872, 0.0202),
        ("road_2", 2_719_744, 0.0404),
        ("road_4", 5_439_488, 0.0807),
        ("lora", 56_098_816, 0.8325),
        ("ia3", 1_359_872, 0.0202),
    ],
)
def test_counts_on_llama_7b(recipe: Any, arm: str, trained: int, percent: float) -> None:
    with torch.device("meta"):
        added = recipe.finetune_arms.ARMS[arm].add(llama_7b(), "CAUSAL_LM", 2, 32)
    found = recipe.finetune_arms.count(added)
    assert (found.trained, found.head, found.model) == (trained, 0, 6_738_415_616)
    assert found.share == pytest.approx(percent, abs=5e-5)


def test_the_pooler_is_of_the_head_and_no_arm_rotates_it(recipe: Any) -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    assert set(recipe.finetune_arms.blocks(model)) == {
        f"bert.encoder.layer.{i}.{name}"
        for i in range(2)
        for name in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    }
    added = recipe.finetune_arms.ARMS["road_2"].add(model, "SEQ_CLS", 32, 8)
    found = recipe.finetune_arms.count(added)
    assert found.head == 64 * 64 + 64 + 2 * 64 + 2
    assert found.trained == 2 * 2 * (5 * 64 + 128)


def test_a_model_without_biases_has_no_bitfit(recipe: Any) -> None:
    with pytest.raises(UserError, match="this model has none; leave it out of --arms"):
        recipe.finetune_arms.ARMS["bitfit"].add(tiny.model(), "CAUSAL_LM", 64, 8)


@pytest.mark.parametrize("arm", ["base", "road_1", "road_2", "road_4", "lora", "ia3", "full"])
def test_an_arm_does_not_change_what_the_model_says(recipe: Any, arm: str) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    model = tiny.model().eval()
    before = model(ids).logits
    added = recipe.finetune_arms.ARMS[arm].add(model, "CAUSAL_LM", 64, 4).eval()
    torch.testing.assert_close(added(ids).logits, before)


# ---- classification -----------------------------------------------------------------------------


def test_metrics_by_hand(recipe: Any) -> None:
    glue = recipe.glue_protocol
    assert glue.accuracy([1, 0, 2, 2], [1, 1, 2, 0]) == 0.5
    # tp 2, tn 1, fp 1, fn 1: (2 - 1) / sqrt(3 * 3 * 2 * 2)
    assert glue.matthews([1, 1, 1, 0, 0], [1, 1, 0, 0, 1]) == pytest.approx(1 / 6)
    assert glue.matthews([0, 1], [1, 0]) == -1.0
    assert glue.matthews([1, 1, 1], [1, 0, 1]) == 0.0
    assert glue.pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert glue.pearson([1.0, 2.0, 4.0], [1.0, 3.0, 2.0]) == pytest.approx(3 / math.sqrt(84))
    assert glue.pearson([1.0, 1.0], [1.0, 2.0]) == 0.0
    with pytest.raises(ValueError, match="2 values cannot be correlated with 1"):
        glue.pearson([1.0, 2.0], [1.0])


def test_the_development_set_is_cut_anew_for_each_seed(recipe: Any) -> None:
    glue = recipe.glue_protocol
    whole = [glue.Pair(str(i), None, i % 2) for i in range(101)]
    chosen, test = glue.cut(whole, 0, None)
    assert (len(chosen), len(test)) == (50, 51)
    assert sorted(chosen + test) == sorted(whole)
    assert glue.cut(whole, 0, None) == (chosen, test)
    assert set(glue.cut(whole, 1, None)[0]) != set(chosen)
    assert [len(part) for part in glue.cut(whole, 0, 30)] == [30, 71]
    with pytest.raises(UserError, match="has 101 examples, 1000 of them"):
        glue.cut(whole, 0, 1000)


def test_the_tasks_are_measured_and_cut_as_the_paper_says(recipe: Any) -> None:
    tasks = recipe.glue_protocol.TASKS
    assert {n for n, task in tasks.items() if task.choosing == 1000} == {"qnli", "qqp", "mnli"}
    assert [n for n, task in tasks.items() if task.metric is recipe.glue_protocol.matthews] == [
        "cola"
    ]
    assert [n for n, task in tasks.items() if task.classes == 1] == ["stsb"]
    assert tasks["stsb"].metric is recipe.glue_protocol.pearson
    assert (tasks["mnli"].classes, tasks["mnli"].development) == (3, "validation_matched")


def test_pairs_do_not_share_an_article_across_the_split(recipe: Any, tmp_path: Path) -> None:
    rows = [
        {"passage": f"Town {i // 2} (place) -- It is a town.{i}", "question": f"is it number {i}"}
        for i in range(80)
    ]
    (tmp_path / "boolq.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, development = recipe.glue_protocol.pairs(tmp_path / "boolq.jsonl", 20)
    assert len(train) + len(development) == 80
    assert len(development) == 20

    def number(question: str) -> int:
        return int(question.removesuffix("?").rpartition(" ")[2])

    def towns(pairs: Any) -> set[str]:
        seen = {f"Town {number(pair.first) // 2}" for pair in pairs}
        return seen | {pair.second.partition(" (")[0] for pair in pairs}

    # the last group may be split in two only where its size says so: both sides know their own
    assert not towns(train) & towns(development)
    for pair in train + development:
        own = pair.second.startswith(f"Town {number(pair.first) // 2} (")
        assert own == bool(pair.label)
    labels = [pair.label for pair in development]
    assert sum(labels) == 10


GLUE_ROWS = {
    "cola": {"sentence": "a", "label": 1},
    "stsb": {"sentence1": "a", "sentence2": "b", "label": 2.5},
    "mnli": {"premise": "a", "hypothesis": "b", "label": 2},
}


@pytest.mark.parametrize("task", GLUE_ROWS)
def test_glue_is_read_from_a_folder(recipe: Any, tmp_path: Path, task: str) -> None:
    row, glue = GLUE_ROWS[task], recipe.glue_protocol
    (tmp_path / task).mkdir()
    for name in ("train", glue.TASKS[task].development):
        (tmp_path / task / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    train, development = glue.read(task, str(tmp_path), 0)
    second = None if task == "cola" else "b"
    assert train == development == [glue.Pair("a", second, float(row["label"]))]
    (tmp_path / task / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="no column"):
        glue.read(task, str(tmp_path), 0)


def test_glue_is_read_by_datasets(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rte").mkdir()
    for name in ("train", "validation"):
        text = f"sentence1,sentence2,label\n{name},b,1\nc,d,0\n"
        (tmp_path / "rte" / f"{name}.csv").write_text(text)
    train, development = recipe.glue_protocol.read("rte", str(tmp_path), 0)
    assert train == [("train", "b", 1.0), ("c", "d", 0.0)]
    assert development[0] == ("validation", "b", 1.0)
    with pytest.raises(UserError, match=r"cannot read sst2 of nobody/nothing: .*--glue"):
        recipe.glue_protocol.read("sst2", "nobody/nothing", 0)


# ---- answers ------------------------------------------------------------------------------------

STATED = [
    ("boolean", "the correct answer is true", "true"),
    ("boolean", "False. It is not true that", "false"),
    ("boolean", "untrue", None),
    ("solution", "solution2 ...", "solution2"),
    ("solution", "Solution1\n\nsolution2", "solution1"),
    ("solution", "solution3", None),
    ("answer", "the correct answer is answer4", "answer4"),
    ("answer", "the answer", None),
    ("answer", "answer12", None),
    ("ending", "ending4.", "ending4"),
    ("option", "option2", "option2"),
    ("option", "option 2", None),
    ("number", "5 + 7 = 12. The answer is 12.", "12"),
    ("number", "It costs $1,234.50 in all", "1234.50"),
    ("number", "3 - 5 = -2", "-2"),
    ("number", "12 apples, or so they say ...", "12"),
    ("number", "none", None),
    ("letter", "A train ... So the answer is (C).", "C"),
    ("letter", "The answer is B. A is wrong.", "B"),
    ("letter", "Answer: D", "D"),
    ("letter", "E", "E"),
    ("letter", "Because", None),
]


@pytest.mark.parametrize(("form", "text", "answer"), STATED)
def test_the_answer_that_is_stated(recipe: Any, form: str, text: str, answer: str | None) -> None:
    assert recipe.answer_protocol.extract(form, text) == answer
    if answer is not None:
        assert recipe.answer_protocol.right(form, text, answer)
    assert not recipe.answer_protocol.right(form, "nothing said", "true")


FORMS = {"true": "boolean", "False": "boolean", "solution1": "solution", "answer5": "answer",
         "ending3": "ending", "option2": "option", "C": "letter", "72.0": "number",
         "-3": "number", "1,800": "number"}  # fmt: skip


@pytest.mark.parametrize(("answer", "form"), FORMS.items())
def test_the_form_of_an_answer(recipe: Any, answer: str, form: str) -> None:
    assert recipe.answer_protocol.form_of(answer) == form


def test_an_answer_of_no_form_is_refused(recipe: Any) -> None:
    for answer in ("perhaps", "answer6", "c", ""):
        with pytest.raises(UserError, match="of no form that is known"):
            recipe.answer_protocol.form_of(answer)


def test_numbers_may_be_off_by_a_thousandth(recipe: Any) -> None:
    right = recipe.answer_protocol.right
    assert right("number", "1.8333", "1.8333333333333335")
    assert right("number", "The answer is 72", "72.0")
    assert right("number", "1,800", "1800")
    assert not right("number", "1.831", "1.8333333333333335")


def question(recipe: Any, **changes: str) -> Any:
    values = {"dataset": "boolq", "instruction": "Is it?", "output": "\nWell. The answer is 4.",
              "answer": "true", "group": "g"}  # fmt: skip
    return recipe.answer_protocol.Question(**(values | changes))


def test_prompts_and_what_the_loss_counts(recipe: Any) -> None:
    tokenizer, suites = tiny.tokenizer(), recipe.answer_protocol.SUITES
    asked = question(recipe)
    prompt, answer = recipe.answer_protocol.encode(asked, suites["commonsense"], tokenizer, 512)
    assert tokenizer.decode(prompt) == "Is it?\nthe correct answer is"
    assert tokenizer.decode(answer) == " true<end>"
    prompt, answer = recipe.answer_protocol.encode(asked, suites["arithmetic"], tokenizer, 512)
    assert tokenizer.decode(prompt) == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request.\n\n### Instruction:\nIs it?\n\n### Response:"
    )
    assert tokenizer.decode(answer) == "\nWell. The answer is 4.<end>"
    prompt, answer = recipe.answer_protocol.encode(asked, suites["commonsense"], tokenizer, 12)
    assert tokenizer.decode(prompt) + tokenizer.decode(answer) == "wer is true<end>"
    braces = question(recipe, instruction="{x} {}")
    prompt, _ = recipe.answer_protocol.encode(braces, suites["commonsense"], tokenizer, 512)
    assert tokenizer.decode(prompt).startswith("{x} {}\n")


ROW = {"instruction": "Is it?", "input": "", "output": "the correct answer is true",
       "answer": "true"}  # fmt: skip


def test_files_and_folders_of_llm_adapters(recipe: Any, tmp_path: Path) -> None:
    read = recipe.answer_protocol.read
    rows = [{**ROW, "instruction": f"Is it {i}?"} for i in range(16)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    found = read(tmp_path / "train.json")
    assert found[3] == ("held out", "Is it 3?", ROW["output"], "true", "Is it 3?")
    for name in ("boolq", "piqa"):
        (tmp_path / name).mkdir()
        with lzma.open(tmp_path / name / "test.json.xz", "wt") as file:
            json.dump([{**ROW, "instruction": f"{name}?", "input": "so"}], file)
    suite = recipe.answer_protocol.SUITES["commonsense"]
    train, chosen_by, test = recipe.answer_protocol.load(
        suite, str(tmp_path / "train.json"), str(tmp_path), 99, 4, seed=1
    )
    assert (len(train), len(chosen_by)) == (12, 4)
    assert not set(train) & set(chosen_by)
    assert [(q.dataset, q.instruction) for q in test] == [
        ("boolq", "boolq?\nso"),
        ("piqa", "piqa?\nso"),
    ]
    (tmp_path / "piqa" / "test.json").write_text(json.dumps(rows[:4]))  # before the .xz in the list
    train, chosen_by, _ = recipe.answer_protocol.load(
        suite, str(tmp_path / "train.json"), str(tmp_path), 99, 4, seed=1
    )
    tested = {f"Is it {i}?" for i in range(4)}
    assert len(train) + len(chosen_by) == 12
    assert not tested & {q.instruction for q in train + chosen_by}
    parts = recipe.answer_protocol.load(suite, str(tmp_path / "train.json"), None, 4, 3, seed=1)
    assert [len(part) for part in parts] == [9, 3, 4]
    assert len(set().union(*parts)) == 16
    with pytest.raises(UserError, match=r"no NAME/train\.json; the names are boolq, piqa"):
        recipe.answer_protocol.load(suite, str(tmp_path), None, 4, 3, seed=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "cannot read the data"),
        ("{}", "holds no list of questions"),
        ("[]", "holds no list of questions"),
        ('[{"instruction": "a"}]', "row 1 has no instruction or no answer"),
        ('[{"instruction": "a", "answer": " "}]', "row 1 has no instruction or no answer"),
        ("[3]", "row 1 has no instruction or no answer"),
    ],
)
def test_a_file_that_cannot_be_used(recipe: Any, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said):
        recipe.answer_protocol.read(tmp_path / "a.json")
    with pytest.raises(UserError, match="cannot read the data"):
        recipe.answer_protocol.read(tmp_path / "nowhere.json")


def test_packaged_questions_are_written_as_llm_adapters_does(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"passage": "A ran.", "question": "Why? ", "options": "A. for fun\nB. to win \nC. no",
         "answer": "B. to win"},
        {"question": "x", "options": "no options", "answer": "B"},
    ]  # fmt: skip
    (tmp_path / "siqa.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    answers = recipe.answer_protocol
    monkeypatch.setattr(answers.assets, "fetch", lambda name: tmp_path / f"{name}.jsonl")
    assert answers.choices("social_i_qa", "siqa") == [
        (
            "social_i_qa",
            "Please choose the correct answer to the question: A ran. Why?\n\nAnswer1: for fun"
            " Answer2: to win Answer3: no\n\nAnswer format: answer1/answer2/answer3",
            "the correct answer is answer2",
            "answer2",
            "A ran.",
        )
    ]


def test_a_group_is_on_one_side_and_each_set_is_held_out(recipe: Any) -> None:
    questions = [
        question(recipe, dataset=f"d{i % 2}", instruction=str(i), group=f"g{i // 4}")
        for i in range(48)
    ]
    train, out = recipe.answer_protocol.split(questions, 8, seed=0)
    assert len(train) + len(out) >= 44  # a group that is held out in part is not trained on
    assert [sum(q.dataset == name for q in out) for name in ("d0", "d1")] == [4, 4]
    for name in ("d0", "d1"):
        sides = [{q.group for q in part if q.dataset == name} for part in (train, out)]
        assert not sides[0] & sides[1]
    again = recipe.answer_protocol.split(questions, 8, seed=1)
    assert set(again[1]) == set(out)
    assert again[0] != train
