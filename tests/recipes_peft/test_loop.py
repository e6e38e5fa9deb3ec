"""The loop trains what has a gradient, by the step count, and measures without a trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from recipes_peft import tiny
from recipes_peft.data import Encoded, Example, encode
from recipes_peft.errors import UserError
from recipes_peft.loop import Point, Training, generate, held_out_loss, measure, train

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
