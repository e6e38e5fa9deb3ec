"""The loop trains what has a gradient, by the step count, and measures without a trace.

It keeps the best weights, and goes on after an interruption as if there had been none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from recipes_peft import tiny
from recipes_peft.checkpoint import Checkpoint
from recipes_peft.data import Encoded, Example, collate, encode
from recipes_peft.errors import UserError
from recipes_peft.loop import Point, Training, fit, generate, held_out_loss, measure, train

TOKENIZER = tiny.tokenizer()
HOW = Training(steps=6, batch_size=8, micro_batch_size=8, learning_rate=1e-2, evaluate_every=4)


def rows(count: int = 24) -> list[Encoded]:
    return [encode(example, TOKENIZER, 64) for example in tiny.examples(count)]


def run(how: Training) -> tuple[list[Point], torch.nn.Module]:
    model = tiny.model()
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    return train(Accelerator(cpu=True), model, rows(), rows(8), how, TOKENIZER, "x"), model


def test_only_what_has_a_gradient_learns_and_the_curve_has_its_points() -> None:
    points, model = run(HOW)
    before = dict(tiny.model().named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith("model.layers.0.")}
    assert [point.step for point in points] == [4, 6]
    assert points[-1].held_out_loss < points[0].held_out_loss
    assert points[-1].held_out_loss == held_out_loss(model, rows(8), 8, TOKENIZER.pad_token_id)
    assert points[-1].train_loss < points[0].train_loss
    assert 0 < points[0].seconds < points[1].seconds


def test_small_pieces_in_memory_make_the_same_step() -> None:
    # The tokens of all answers are as many, so the mean over pieces is the mean over the batch.
    _, whole = run(HOW)
    _, pieces = run(Training(**{**HOW.__dict__, "micro_batch_size": 2}))
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_seed_decides() -> None:
    _, one = run(HOW)
    _, same = run(HOW)
    _, other = run(Training(**{**HOW.__dict__, "seed": 1}))
    moved = [m.model.layers[0].mlp.up_proj.weight for m in (one, same, other)]
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_more_steps_than_the_data_has_go_round() -> None:
    points, _ = run(Training(**{**HOW.__dict__, "steps": 7, "evaluate_every": 100}))
    assert [point.step for point in points] == [7]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_falls_as_the_schedule_says(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW, *rest: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)  # type: ignore[arg-type]  # whatever it was given

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    run(Training(**{**HOW.__dict__, "schedule": schedule, "warmup": 2 / 6}))
    shares = {
        "linear": [0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4],
        "cosine": [0, 1 / 2, 1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2],
        "constant": [0, 1 / 2, 1, 1, 1, 1],
    }[schedule]
    assert rates == pytest.approx([1e-2 * share for share in shares])


def test_weight_decay_pulls_to_zero_and_is_off_by_default() -> None:
    def norm(decay: float) -> torch.Tensor:
        _, model = run(Training(**{**HOW.__dict__, "weight_decay": decay}))
        return model.model.layers[0].mlp.up_proj.weight.detach().norm()

    assert Training(**HOW.__dict__).weight_decay == 0.0
    assert norm(10.0) < 0.9 * norm(0.0)


def test_settings_of_the_same_names_say_how_to_train() -> None:
    settings = SimpleNamespace(**{**HOW.__dict__, "steps": None, "schedule": "cosine", "other": 1})
    assert Training.of(settings, 6) == Training(**{**HOW.__dict__, "schedule": "cosine"})
    with pytest.raises(UserError, match="schedule is 'wavy'; choose from linear, cosine, constant"):
        Training(**{**HOW.__dict__, "schedule": "wavy"})


def test_held_out_loss_is_a_mean_over_tokens_whatever_the_batch() -> None:
    model, data = tiny.model(), rows(7)
    data.append(encode(Example("x", "a longer answer", "g"), TOKENIZER, 64))
    one = held_out_loss(model, data, 1, 256)
    assert held_out_loss(model, data, 3, 256) == pytest.approx(one, rel=1e-5)


def test_answers_come_in_order_and_say_whether_they_ended() -> None:
    model, data = copy.deepcopy(tiny.model()), rows(5)
    cut = generate(model, TOKENIZER, data, max_new_tokens=3, batch_size=2)
    assert all(text.endswith(" ...") for text in cut)
    assert cut == [generate(model, TOKENIZER, [row], 3, 1)[0] for row in data]
    # A head that always prefers the end token.
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.eye(257)[256])
    assert generate(model, TOKENIZER, data, 3, 2) == [""] * 5
    result = measure(model, TOKENIZER, data, ["", "", "", "", "x"], 3, 2)
    assert result.exact_match == 0.8
    shortest = measure(model, TOKENIZER, data, ["a"] * 5, 3, 2, lambda got, want: float(got < want))
    assert shortest.exact_match == 1.0
    silent = measure(model, TOKENIZER, data, [], 3, 2, None)
    assert (silent.exact_match, silent.answers) == (None, [])
    assert silent.held_out_loss == result.held_out_loss
    assert measure(model, TOKENIZER, data, [], 3, 2, None, loss=7.0).held_out_loss == 7.0


def fitted(
    how: Training,
    scores: Sequence[float | None] = (),
    saved: Path | None = None,
    stop: int = 100,
) -> tuple[list[Point], dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Train with these scores, and dropout; give the points, the weights at the end and at each."""
    model = tiny.model()
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(
        lambda module, args: (torch.nn.functional.dropout(args[0], 0.2, module.training),)
    )
    seen: list[dict[str, torch.Tensor]] = []
    remaining = iter(scores)

    def now() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def measured() -> tuple[float, float | None]:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(now())
        return held_out_loss(model, rows(8), 8, 256), next(remaining, None)

    torch.manual_seed(3)
    join = partial(collate, pad=256)
    points = fit(
        Accelerator(cpu=True), model, rows(), join, how, measured, "x", saved, save_every=0
    )
    return points, now(), seen


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


EVERY_TWO = Training(**{**HOW.__dict__, "evaluate_every": 2})


def test_the_best_weights_are_kept_the_first_of_equals() -> None:
    points, weights, seen = fitted(EVERY_TWO, [0.5, 0.7, 0.7])
    assert [point.score for point in points] == [0.5, 0.7, 0.7]
    assert same(weights, seen[1])
    assert not same(seen[1], seen[2])


@pytest.mark.parametrize("scores", [[None] * 3, [float("nan")] * 3])
def test_without_a_best_the_last_weights_are_kept(scores: list[float | None]) -> None:
    _, weights, seen = fitted(EVERY_TWO, scores)
    assert same(weights, seen[2])


def test_training_by_answers_keeps_the_best_too() -> None:
    model = tiny.model()
    seen, scores = [], iter([1.0, 0.0])

    def score() -> float:
        seen.append(model.lm_head.weight.detach().clone())
        return next(scores)

    points = train(Accelerator(cpu=True), model, rows(), rows(8), HOW, TOKENIZER, "x", score=score)
    assert [point.score for point in points] == [1.0, 0.0]
    assert torch.equal(model.lm_head.weight, seen[0])


def test_an_interrupted_training_ends_with_the_same_numbers(tmp_path: Path) -> None:
    # 24 rows in pieces of 4: the second half of the 7 steps is in the third epoch
    how = Training(steps=7, batch_size=8, micro_batch_size=4, learning_rate=1e-2, evaluate_every=2)
    scores = [0.1, 0.9, 0.3, 0.2]
    whole, best, at = fitted(how, scores)
    file = tmp_path / "progress.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fitted(how, scores, file, stop=2)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    resumed, again, rest = fitted(how, scores[2:], file)
    assert [(p.step, p.train_loss, p.held_out_loss, p.score) for p in resumed] == [
        (p.step, p.train_loss, p.held_out_loss, p.score) for p in whole
    ]
    assert same(again, best)
    assert same(rest[-1], at[-1])
    # Once more, from the end: nothing is left to do, and the best is still known.
    points, still, nothing = fitted(how, [], file)
    assert (points, nothing) == (resumed, [])
    assert same(still, best)


def test_a_file_of_other_settings_is_not_gone_on_from(tmp_path: Path) -> None:
    file = tmp_path / "progress.safetensors"
    fitted(EVERY_TWO, saved=file)
    other = Training(**{**EVERY_TWO.__dict__, "learning_rate": 2e-2})
    _, weights, seen = fitted(other, saved=file)
    assert len(seen) == 3
    assert same(weights, fitted(other)[1])
    file.write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match=r"cannot go on from .*; delete it to start anew"):
        fitted(other, saved=file)


def test_nothing_is_written_before_its_time(tmp_path: Path) -> None:
    model, data = tiny.model(), rows()
    file = tmp_path / "progress.safetensors"
    train(Accelerator(cpu=True), model, data, rows(8), HOW, TOKENIZER, "x", saved=file)
    assert not file.exists()
    with pytest.raises(UserError, match="nothing to train on"):
        train(Accelerator(cpu=True), model, [], rows(8), HOW, TOKENIZER, "x")


def checkpoint(
    file: Path, *, main: bool = True, every: float = 0, scale: float = 8.0
) -> tuple[Checkpoint, torch.nn.Parameter]:
    """Give the checkpoint of a training of one weight, and the weight."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    process: Any = SimpleNamespace(is_main_process=main, scaler=scaler)
    made = Checkpoint(process, {"w": weight}, optimizer, schedule, {"name": "x"}, file, every)
    return made, weight


def test_a_checkpoint_has_points_of_any_kind_and_all_that_moves(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    before, weight = checkpoint(file)
    for number in (1.5, ["a", None]):
        weight.grad = torch.tensor([1.0, -1.0])
        before.optimizer.step()
        before.points.append(number)
        if number == 1.5:
            before.keep_best()
    before.save_if_due()
    after, other = checkpoint(file, scale=2.0)
    assert after.resume()
    assert after.points == [1.5, ["a", None]]
    assert torch.equal(other, weight)
    assert after.accelerator.scaler.get_scale() == 8.0
    moments = [c.optimizer.state_dict()["state"][0]["exp_avg"] for c in (before, after)]
    assert torch.equal(*moments)
    after.take_best()
    torch.testing.assert_close(other.detach(), torch.tensor([-1.0, 1.0]))


def test_the_main_process_writes_and_not_too_often(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for made, _ in (checkpoint(file, main=False), checkpoint(file, every=60)):
        made.save_if_due()
        assert not made.resume()
    assert not list(tmp_path.iterdir())
