"""The self-correction recipe: its equations, its Trainer, and the script in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainingArguments

from recipes_peft import parallel, tiny, translation
from recipes_peft.data import collate
from tests.examples import _recipes

with _recipes.beside("self_correction"):
    import correction
    from correction import (
        CorrectedTrainer,
        CrossEntropy,
        ErrorNormTruncation,
        SelfCorrectionLoss,
        TruncationLoss,
        certainty,
        cross_entropy,
        error_norm,
        label_mass,
        selected,
        sharpened,
        trust,
    )

# ---- equations ----------------------------------------------------------------------------------


def logits_and_targets(rows: int = 40, words: int = 13) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, words).mul(3).requires_grad_(), torch.randint(words, (rows,))


def gradient(loss: Callable[..., Tensor], z: Tensor, y: Tensor, *rest: Any) -> Tensor:
    return torch.autograd.grad(loss(z, y, *rest).sum(), z)[0]


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, 0.027), (0.25, 0.109), (0.5, 0.354), (0.6, 0.5), (0.75, 0.711), (1, 0.917)],
)
def test_trust_grows_as_specified(progress: float, expected: float) -> None:
    assert trust(progress) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("certain", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_is_prediction_minus_revised_label(certain: bool, smoothing: float) -> None:
    z, y = logits_and_targets()
    loss = SelfCorrectionLoss(certainty=certain, label_smoothing=smoothing)
    share = loss.share(z.detach(), 0.7)[:, None]
    q = torch.nn.functional.one_hot(y, 13) * (1 - smoothing) + smoothing / 13
    revised = (1 - share) * q + share * sharpened(z, 0.5)
    torch.testing.assert_close(
        gradient(loss, z, y, 0.7), (z.softmax(-1) - revised).detach(), atol=1e-6, rtol=0
    )
    dense = -(revised * z.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss(z, y, 0.7), dense, atol=1e-5, rtol=1e-5)


def test_without_trust_it_is_cross_entropy() -> None:
    z, y = logits_and_targets()
    loss = SelfCorrectionLoss(beta=1e9, label_smoothing=0.1)
    plain = CrossEntropy(0.1)
    torch.testing.assert_close(loss(z, y, 1.0), plain(z, y, 1.0), atol=0, rtol=0)
    torch.testing.assert_close(gradient(loss, z, y, 1.0), gradient(plain, z, y, 1.0))
    wanted = torch.nn.functional.cross_entropy(z, y, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(plain(z, y, 0.0), wanted)


def test_with_tau_one_it_is_a_lower_learning_rate() -> None:
    z, y = logits_and_targets()
    loss = SelfCorrectionLoss(tau=1.0, certainty=False)
    scaled = (1 - trust(0.8)) * gradient(CrossEntropy(), z, y, 0.8)
    torch.testing.assert_close(gradient(loss, z, y, 0.8), scaled, atol=1e-6, rtol=0)


def test_with_full_trust_the_label_is_ignored_and_entropy_falls() -> None:
    z, y = logits_and_targets()
    loss = SelfCorrectionLoss(beta=-1e9, certainty=False)
    found = gradient(loss, z, y, 0.0)
    torch.testing.assert_close(found, gradient(loss, z, (y + 1) % 13, 0.0))
    before, after = (torch.special.entr(v.softmax(-1)).sum() for v in (z, z - 0.1 * found))
    assert after < before


def test_a_contradicted_label_loses_and_the_own_word_gains() -> None:
    z = torch.tensor([[4.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([1])
    corrected = gradient(SelfCorrectionLoss(), z, y, 1.0)
    plain = gradient(CrossEntropy(), z, y, 1.0)
    assert plain[0, 1] < corrected[0, 1]  # the label is pulled up less
    assert 0 < corrected[0, 0] < plain[0, 0] / 4  # and the model's own word is nearly left alone


def test_certainty_goes_from_none_to_all_and_counts_usable_words() -> None:
    assert certainty(torch.zeros(1, 8)).item() == pytest.approx(0, abs=1e-6)
    assert certainty(torch.tensor([[100.0, 0, 0]])).item() == pytest.approx(1)
    masked = torch.tensor([[0.0, 0, 0, -torch.inf, -torch.inf]])
    assert certainty(masked).item() == pytest.approx(0, abs=1e-6)
    half = torch.tensor([[0.0, 0.0, -torch.inf, -1e4]])  # two of three usable words
    assert certainty(half).item() == pytest.approx(1 - math.log(2) / math.log(3))


def test_masked_words_do_not_make_the_loss_infinite() -> None:
    z, y = logits_and_targets()
    narrow = z.detach().clone().requires_grad_()
    wide = torch.cat([narrow, torch.full((40, 2), -torch.inf)], -1)
    loss = SelfCorrectionLoss(label_smoothing=0.1)
    torch.testing.assert_close(loss(wide, y, 0.9), loss(z, y, 0.9))
    (found,) = torch.autograd.grad(loss(wide, y, 0.9).sum(), narrow)
    torch.testing.assert_close(found, gradient(loss, z, y, 0.9))


def test_chunks_change_nothing_and_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = logits_and_targets()
    loss = SelfCorrectionLoss(label_smoothing=0.1)
    whole = loss(z, y, 0.6).detach(), gradient(loss, z, y, 0.6)
    seen: list[int] = []

    def spy(logits: Tensor, temperature: float) -> Tensor:
        seen.append(len(logits))
        return sharpened(logits, temperature)

    monkeypatch.setattr(correction, "CHUNK", 7)
    monkeypatch.setattr(correction, "sharpened", spy)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() if tensor.untyped_storage().data_ptr() != address else 0
        return tensor

    address = z.untyped_storage().data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = loss(z, y, 0.6)
    assert max(seen) == 7
    assert kept < z.numel()  # no distribution waits for the backward pass
    torch.testing.assert_close(found, whole[0])
    torch.testing.assert_close(gradient(loss, z, y, 0.6), whole[1])


def test_bfloat16_logits_are_computed_in_float32() -> None:
    z, y = logits_and_targets()
    half = z.detach().bfloat16()
    torch.testing.assert_close(
        SelfCorrectionLoss()(half, y, 0.7), SelfCorrectionLoss()(half.float(), y, 0.7)
    )


def test_error_norm_has_its_bounds() -> None:
    z = torch.tensor([[50.0, 0, 0], [0, 50.0, 0], [0, 0, 0]])
    y = torch.tensor([0, 0, 0])
    wanted = torch.tensor([0, math.sqrt(2), math.sqrt((2 / 3) ** 2 + 2 / 9)])
    torch.testing.assert_close(error_norm(z, y), wanted)


def test_truncation_waits_and_then_ignores_the_worst() -> None:
    z, y = logits_and_targets(10)
    loss = TruncationLoss(fraction=0.2, start=0.3)
    plain = cross_entropy(z, y)
    torch.testing.assert_close(loss(z, y, 0.29), plain)
    late = loss(z, y, 0.3)
    assert set((late == 0).nonzero().flatten().tolist()) == set(plain.topk(2).indices.tolist())
    assert (gradient(loss, z, y, 0.3)[late == 0] == 0).all()


def test_error_norms_are_truncated_above_the_threshold() -> None:
    z = torch.tensor([[0.0, 9, 0], [0.0, 0, 0], [9.0, 0, 0]], requires_grad=True)
    y = torch.tensor([0, 0, 0])
    loss = ErrorNormTruncation(threshold=1.3, start=0.3)
    assert (loss(z, y, 0.2) != 0).all()
    # as costly as the first, but the prediction favours nothing else
    assert (loss(z, y, 0.5) == 0).tolist() == [True, False, False]


def test_what_is_left_of_a_label() -> None:
    z, y = torch.tensor([[0.0, 8, 0], [8.0, 0, 0]]), torch.tensor([0, 0])
    noisy, clean = label_mass(SelfCorrectionLoss(), z, y, 1.0)
    assert clean > 0.99
    assert noisy == pytest.approx(1 - trust(1) * certainty(z[:1]).item(), abs=1e-3)
    assert label_mass(CrossEntropy(), z, y, 1.0).tolist() == [1, 1]


def test_positions_that_count_are_selected() -> None:
    z = torch.arange(12.0).view(1, 4, 3)
    labels = torch.tensor([[-100, 1, -100, 2]])
    found, y = selected(z, labels)
    assert y.tolist() == [1, 2]
    assert found.tolist() == [z[0, 0].tolist(), z[0, 2].tolist()]
    assert selected(z, labels, causal=False)[0].tolist() == [z[0, 1].tolist(), z[0, 3].tolist()]


# ---- Trainer ------------------------------------------------------------------------------------


def trained(
    tmp_path: Path, micro: int, loss: Any, teacher: bool = False
) -> tuple[Any, list[float]]:
    tokenizer = tiny.tokenizer()
    rows = [
        translation.encode(pair, tokenizer, 100) for pair in parallel.tiny_pairs("de", "en", 24)
    ]
    model: Any = tiny.model()
    if teacher:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    seen: list[float] = []

    def watched(z: Tensor, y: Tensor, progress: float, *more: Tensor) -> Tensor:
        seen.append(progress)
        assert z.shape[-1] == 257
        return loss(z, y, progress, *more)

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        learning_rate=1e-2,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_grad_norm=0.0,
    )
    CorrectedTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, pad=tokenizer.pad_token_id),
        token_loss=watched,
        vocabulary=257,
        teacher=teacher,
    ).train()
    return model, seen


def test_accumulation_changes_neither_progress_nor_result(tmp_path: Path) -> None:
    whole, steps = trained(tmp_path, 8, SelfCorrectionLoss())
    parts, counted = trained(tmp_path, 2, SelfCorrectionLoss())
    assert steps == [0, 0.25, 0.5, 0.75]
    assert counted == [progress for progress in steps for _ in range(4)]
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0, msg=name)


def test_a_teacher_is_the_model_without_its_adapter(tmp_path: Path) -> None:
    believed: list[Tensor] = []

    def loss(z: Tensor, y: Tensor, progress: float, teacher: Tensor) -> Tensor:
        believed.append((teacher - z).abs().max().detach())
        assert not teacher.requires_grad
        return SelfCorrectionLoss()(z, y, progress, teacher)

    trained(tmp_path, 8, loss, teacher=True)
    assert believed[0] < 1e-5  # LoRA starts as nothing
    assert believed[-1] > 1e-3


# ---- the script ---------------------------------------------------------------------------------

FEW = ("--smoke", "--tuners", "road", "--steps", "2", "--checks", "2", "--test-pairs", "2")
FEW += ("--warm-steps", "0", "--train-pairs", "24", "--check-pairs", "8")


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def run(*argv: str) -> int:
    with _recipes.beside("self_correction"):
        return _recipes.run("self_correction", *argv)


def results() -> dict[str, Any]:
    return json.loads(Path("demo-output/results.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("_elsewhere")
def test_runs_are_kept_and_a_changed_setting_makes_them_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*FEW, "--arms", "ce", "self", "--rates", "0.5") == 0
    assert "2 of 3: road-0.5-ce-0" in capsys.readouterr().out
    first = results()
    assert [r["arm"] for r in first["runs"]] == ["base", "ce", "self"]
    assert first["promises"]["S0 the loss is exact"]
    assert {c["progress"] for c in first["runs"][1]["checks"]} == {0.5, 1.0}
    assert set(first["runs"][1]["filters"]) == {"length", "similarity", "loss"}
    for name in ("results.csv", "curves.csv", "curves.png", "adapters/road-0.5-self-0"):
        assert Path("demo-output", name).exists()
    # more arms: what is there is not made again, and is the same
    assert run(*FEW, "--arms", "ce", "self", "tau1", "--rates", "0.5") == 0
    shown = capsys.readouterr().out
    assert "4 of 4: road-0.5-tau1-0" in shown
    assert "road-0.5-ce-0" not in shown
    assert results()["runs"][:3] == first["runs"]
    assert any(promise.startswith("S2") for promise in results()["promises"])
    assert run(*FEW, "--arms", "ce", "--rates", "0.5", "--road-learning-rate", "0.1") == 0
    assert "2 of 2: road-0.5-ce-0" in capsys.readouterr().out
    assert results()["runs"][1]["loss"] != first["runs"][1]["loss"]


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("section", ["--paper-scratch", "--paper-tuning", "--characters"])
def test_other_sections_run_on_tiny_inputs(section: str) -> None:
    rows = [
        {"translation": {"de": p.source, "en": p.target}, "document": p.document}
        for p in parallel.tiny_pairs("de", "en", 40)
    ]
    Path("web").mkdir()
    Path("web/train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    small = ["--layers", "1", "--hidden", "64", "--steps", "2", "--test-pairs", "2"]
    small += ["--batch-size", "4", "--micro-batch-size", "2", "--checks", "1", "--seeds", "1"]
    small += [
        "--encoder",
        "tfidf",
        "--arms",
        "ce",
        "self",
        "--tuners",
        "road",
        "--dtype",
        "float32",
    ]
    small += ["--calibration-samples", "1", "--calibration-length", "16", "--max-new-tokens", "2"]
    small += ["--development-pairs", "2", "--warm-pairs", "4", "--road-group-size", "32"]
    small += ["--max-length", "160", "--keep", "best"]
    model = [] if section != "--paper-tuning" else ["--model", "tiny"]
    data = ["--data", "hub:web", "--source", "de", "--target", "en"]
    if section == "--characters":
        small += ["--warm-steps", "2"]
    assert run(section, *small, *model, *data) == 0
    assert len(results()["runs"]) >= 3


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--rates", "1.5"), "rates are 1.5; give shares below 1"),
        (("--rates", "half"), "--rates: could not convert"),
        (("--tuners", "full"), "the arm distilled needs an adapter"),
        (("--noise", "loud"), "noise is 'loud'; choose from shuffle, easy"),
        (("--max-length", "5"), "no pair of tiny has at most 5 tokens"),
    ],
)
def test_bad_input_is_one_sentence(
    argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--smoke", *argv) == 2
    assert message in capsys.readouterr().err
