"""The recipe's equations, attention, gates, outliers and 8 bits: identities and golden numbers."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    OPTConfig,
)

from recipes_peft import errors
from tests.examples import _recipes

with _recipes.beside("outlier_free_softmax") as _modules:
    RECIPE: dict[str, ModuleType] = vars(_modules)
variants, attention, toys = RECIPE["softmax_variants"], RECIPE["attention"], RECIPE["toys"]
outliers, w8a8, measure = RECIPE["outlier_metrics"], RECIPE["w8a8"], RECIPE["measure"]
Variant = variants.Variant
NCS = Variant("normalized", 1.03, beta=0.7)
CS = Variant("clipped", 1.0, gamma=-0.02)


def bert(variant: Any = NCS, gate: Any = None) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, initializer_range=0.5,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
    )  # fmt: skip
    attention.configure(config, variant, gate)
    return attention.build(AutoModelForMaskedLM, config).eval()


def opt(variant: Any = NCS, gate: Any = None) -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=30, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2,
        num_attention_heads=2, ffn_dim=32, max_position_embeddings=16, init_std=0.5, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    attention.configure(config, variant, gate)
    return attention.build(AutoModelForCausalLM, config).eval()


IDS = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(1))


# ---- softmax --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 17, 512])
@pytest.mark.parametrize(("zeta", "beta"), [(1.03, 1.0), (1.0, 0.5), (1.0, -2.175)])
def test_rows_sum_to_beta_before_clipping_at_every_length(
    length: int, zeta: float, beta: float
) -> None:
    p = torch.softmax(torch.randn(5, length, dtype=torch.float64), -1)
    if length > 1:
        gamma = variants.gamma_of_beta(beta, zeta, length)
        total = ((zeta - gamma) * p + gamma).sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, beta), atol=1e-5, rtol=0)
        assert variants.row_sum(length, zeta, gamma) == pytest.approx(beta)
        assert zeta - gamma == pytest.approx((zeta * length - beta) / (length - 1))
    else:
        found = variants.normalized_clipped_softmax(
            torch.randn(5, 1), torch.ones(5, 1, dtype=torch.long), zeta, beta
        )
        assert torch.equal(found, torch.ones(5, 1))


def test_the_two_are_equal_at_one_length_and_differ_at_others() -> None:
    beta = variants.beta_of(-0.025, 1.0, 128)
    assert beta == pytest.approx(-2.175)
    assert variants.gamma_of_alpha(12, 512) == -12 / 512
    for length, same in ((128, True), (16, False)):
        scores = 3 * torch.randn(50, length)
        count = torch.full((50, 1), length)
        clipped = variants.clipped_softmax(scores, 1.0, -0.025)
        found = variants.normalized_clipped_softmax(scores, count, 1.0, beta)
        assert torch.allclose(clipped, found, atol=1e-6) == same


def test_with_ones_it_is_the_softmax_and_hidden_keys_are_zero() -> None:
    scores, visible = torch.randn(4, 9), torch.rand(4, 9) < 0.7
    visible[:, 0] = True
    hidden = scores.masked_fill(~visible, torch.finfo(torch.float32).min)
    count = visible.sum(-1, keepdim=True)
    found = Variant("normalized", 1.0, beta=1.0)(hidden, count, visible)
    torch.testing.assert_close(found, torch.softmax(hidden, -1))
    for variant in (NCS, CS, Variant("normalized", 1.2, beta=1.2)):
        assert not variant(hidden, count, visible)[~visible].any()


def test_keys_below_a_multiple_of_uniform_attention_are_zeroed_and_get_no_gradient() -> None:
    length, zeta, beta = 10, 1.0, 0.5
    threshold = (zeta - beta) / (zeta * length - beta)  # p below it is 0
    p = torch.tensor([threshold * 0.99, threshold * 1.01, 0.0])
    p = torch.cat([p[:2], torch.full((8,), (1 - p[:2].sum()) / 8)])
    scores = p.log().requires_grad_()
    found = variants.normalized_clipped_softmax(scores, torch.tensor([length]), zeta, beta)
    assert found[0] == 0
    assert found[1] > 0
    uniform = torch.zeros(10, requires_grad=True)
    dead = variants.normalized_clipped_softmax(uniform, torch.tensor([10]), 1.0, -2.0)
    dead.sum().backward()
    assert not dead.any()
    assert not uniform.grad.any()


@pytest.mark.parametrize(
    ("name", "length", "total", "zeros"),
    [
        ("cs", 8, 0.856, 0.29), ("cs", 128, 0.276, 0.93), ("cs", 512, 0.077, 0.993),
        ("ncs", 8, 0.258, 0.88), ("ncs", 128, 0.276, 0.93), ("ncs", 512, 0.286, 0.935),
        ("ncs-a", 8, 1.001, 0.054), ("ncs-a", 512, 1.001, 0.054),
    ],
)  # fmt: skip
def test_golden_sums_and_zeros_of_random_rows(
    name: str, length: int, total: float, zeros: float
) -> None:
    found = toys.row_statistics(toys.RANDOM[name], length)
    assert found[0] == pytest.approx(total, abs=0.015)
    assert found[1] == pytest.approx(zeros, abs=0.01)


def test_golden_gaps_of_a_head_that_does_nothing() -> None:
    soft = toys.no_op_head(toys.NO_OP["softmax"], (500, 800))
    half = toys.no_op_head(toys.NO_OP["ncs-half"], (500, 800))
    assert soft[0][0] == pytest.approx(5.86, abs=0.25)
    assert soft[1][0] > soft[0][0] + 0.2
    assert half[0][0] == pytest.approx(4.19, abs=0.25)
    assert half[1][0] == pytest.approx(half[0][0], abs=1e-4)
    assert half[0][1] < 1e-12 < soft[1][1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "sparsemax"}, "choose from softmax, clipped, normalized"),
        ({"zeta": 0.9}, "stretch must be 1 or above"),
        ({"kind": "clipped", "gamma": 0.1}, "must be 0 or below"),
        ({"kind": "normalized", "beta": 1.1}, "at most zeta"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.UserError, match=said):
        Variant(**options)


# ---- attention ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, opt])
def test_the_plain_softmax_is_that_of_transformers(make: Any) -> None:
    model = make(Variant())
    mask = torch.ones_like(IDS)
    mask[0, -4:] = 0
    found = model(input_ids=IDS, attention_mask=mask).logits
    model.set_attn_implementation("eager")
    wanted = model(input_ids=IDS, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", [NCS, CS], ids=["ncs", "cs"])
def test_decoding_with_a_cache_is_the_full_forward_pass(variant: Any) -> None:
    assert measure.decoding(opt(variant), IDS[0].tolist()) <= 1e-5


@torch.no_grad()
def test_a_causal_row_is_that_of_its_prefix() -> None:
    model = opt()
    whole = model(input_ids=IDS).logits
    for t in (1, 2, 7):
        torch.testing.assert_close(
            whole[:, :t], model(input_ids=IDS[:, :t]).logits, atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize(("make", "side"), [(bert, "right"), (opt, "left")])
def test_padding_is_not_counted(make: Any, side: str) -> None:
    model = make()
    pad = torch.zeros(2, 3, dtype=torch.long)
    real = [pad + 1, torch.ones_like(IDS)]
    padded = torch.cat([IDS, pad] if side == "right" else [pad, IDS], 1)
    mask = torch.cat([torch.ones_like(IDS), pad] if side == "right" else [pad, real[1]], 1)
    found = model(input_ids=padded, attention_mask=mask).logits
    found = found[:, :12] if side == "right" else found[:, 3:]
    torch.testing.assert_close(found, model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_documents_side_by_side_have_the_keys_of_their_own() -> None:
    model = opt()
    block = torch.zeros(1, 1, 12, 12, dtype=torch.bool)
    block[..., :5, :5] = block[..., 5:, 5:] = True
    block &= torch.ones(12, 12, dtype=torch.bool).tril()
    mask = torch.where(block, 0.0, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    found = model(input_ids=IDS[:1], attention_mask=mask, position_ids=positions)
    alone = model(input_ids=IDS[:1, 5:]).logits
    torch.testing.assert_close(found.logits[:, 5:], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_keys_are_repeated_for_groups_of_heads() -> None:
    module = nn.Module()
    module.config = attention.configure(OPTConfig(), NCS)
    query, key, value = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    found = attention.attend(module.eval(), query, key, value, None)[0]
    repeated = [x.repeat_interleave(2, 1) for x in (key, value)]
    torch.testing.assert_close(found, attention.attend(module, query, *repeated, None)[0])
    assert found.shape == (1, 5, 4, 8)


def test_a_function_without_its_mask_is_refused() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register("ncs-without-mask", attention.attend)
    model = opt()
    model.set_attn_implementation("ncs-without-mask")
    with pytest.raises(RuntimeError, match="would see the future"):
        model(input_ids=IDS)


def test_a_saved_model_attends_as_before_and_others_are_refused(tmp_path: Path) -> None:
    model = bert(NCS)
    model.save_pretrained(tmp_path / "model")
    again = attention.restore(tmp_path / "model", AutoModelForMaskedLM)
    assert attention.variant_of(again.config) == NCS
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with attention.swapped(again, CS):
        assert not torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    del model.config.attention_variant
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(errors.UserError, match="does not say how its attention was computed"):
        attention.restore(tmp_path / "other", AutoModelForMaskedLM)
    with pytest.raises(errors.UserError, match="cannot load the model"):
        attention.restore(tmp_path / "nothing", AutoModelForMaskedLM)


# ---- gates ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", attention.GATES)
def test_a_gate_lets_pi_through_at_first_and_is_loaded_again(kind: str, tmp_path: Path) -> None:
    how = attention.GateConfig(kind, pi=0.25, std=0.0)
    gate = attention.Gate(16, 2, how)
    found = gate(torch.randn(3, 5, 16))
    torch.testing.assert_close(found, torch.full((3, 2, 5, 1), 0.25))
    model = opt(Variant(), attention.GateConfig(kind, std=0.5))
    model.save_pretrained(tmp_path)
    again = attention.restore(tmp_path, AutoModelForCausalLM)
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    classifier = attention.restore(tmp_path, AutoModelForSequenceClassification)
    gates = [m.gate for m in attention.attentions(model)]
    for one, other in zip(attention.attentions(classifier), gates, strict=True):
        assert torch.equal(one.gate.weights[0], other.weights[0])


@torch.no_grad()
def test_a_gate_added_to_a_trained_model_changes_nothing_at_first() -> None:
    plain = bert(Variant())
    gated = bert(Variant())
    attention.add_gates(gated, attention.GateConfig(pi=0.25, std=0.0, scale=4.0))
    wanted = plain(input_ids=IDS).logits
    torch.testing.assert_close(gated(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_a_linear_gate_sees_its_own_head_only() -> None:
    gate = attention.Gate(16, 2, attention.GateConfig(std=0.5))
    x = torch.randn(1, 3, 16, requires_grad=True)
    gate(x)[:, 0].sum().backward()
    assert x.grad[..., :8].abs().min() > 0
    assert not x.grad[..., 8:].any()
    with pytest.raises(errors.UserError, match="choose from linear, mlp, heads"):
        attention.GateConfig("cubic")
    with pytest.raises(errors.UserError, match="between 0 and 1"):
        attention.GateConfig(pi=1.0)


# ---- outliers -------------------------------------------------------------------------------


def test_norms_and_kurtoses_are_of_sequences() -> None:
    x = torch.tensor([[[1.0, -3.0]], [[2.0, 2.5]]])
    assert outliers.inf_norms(x, 2).tolist() == [3.0, 2.5]
    values = torch.tensor([[0.0, 0.0, 0.0, 4.0]])  # deviations -1 -1 -1 3: 84 / 4 over 3 ** 2
    assert outliers.kurtoses(values, 1).item() == pytest.approx(21 / 9, rel=1e-5)
    normal = torch.randn(4, 100, 100)
    assert outliers.kurtoses(normal, 4).mean().item() == pytest.approx(3, abs=0.1)
    torch.testing.assert_close(
        outliers.kurtoses(normal, 4), outliers.kurtoses(normal.reshape(400, 100), 4)
    )


@pytest.mark.parametrize(("make", "outputs", "inputs"), [(bert, 4, 2), (opt, 11, 0)])
def test_the_tensors_of_the_released_code_are_watched(make: Any, outputs: int, inputs: int) -> None:
    model = make()
    with outliers._watched(model) as meter:
        meter.sequences = 2
        model(input_ids=IDS)
    assert len(meter.tails) == outputs
    assert len(meter.norms) == outputs + inputs
    assert not any(m._forward_hooks for m in model.modules())
    found = outliers.measure(model, [{"input_ids": IDS}, {"input_ids": IDS[:1]}])
    assert found.max_inf_norm > 0
    assert found.max_kurtosis >= found.avg_kurtosis > 0


# ---- eight bits -----------------------------------------------------------------------------


def test_golden_numbers_of_the_grids() -> None:
    weight = torch.tensor([1.27, -0.634, 0.004])
    torch.testing.assert_close(w8a8.symmetric(weight), torch.tensor([1.27, -0.63, 0.0]))
    seen = w8a8.Observer()
    seen(torch.tensor([-1.0, 1.0]))
    seen(torch.tensor([-2.0, 4.0]))
    assert (seen.low, seen.high) == (pytest.approx(-1.1), pytest.approx(1.3))
    seen.low, seen.high, seen.frozen = -0.55, 2.0, True  # steps of 0.01, zero at code 55
    found = seen(torch.tensor([0.0, 0.014, -9.0, 9.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.01, -0.55, 2.0]))
    tail = w8a8.Observer(percentile=99.0)
    tail(torch.arange(101.0))
    assert (tail.low, tail.high) == (pytest.approx(1), pytest.approx(99))
    with pytest.raises(RuntimeError, match="never seen in calibration"):
        w8a8.Observer().rounded(torch.zeros(1))


@torch.no_grad()
@pytest.mark.parametrize("make", [bert, opt])
def test_eight_bits_are_close_and_everything_is_put_back(make: Any) -> None:
    model = make()
    batch = {"input_ids": IDS}
    before = model(**batch).logits
    head = model.lm_head if make is opt else model.cls.predictions.decoder
    tied = head.weight
    with w8a8.weights(model), w8a8.activations(model, [batch, batch], None) as seen:
        rounded = model(**batch).logits
        assert head.weight is tied
        assert model.get_input_embeddings().weight is not tied
        attended = [m.activation_quantizers for m in attention.attentions(model)]
        assert all(set(points) == {"scores", "probs", "context"} for points in attended)
        assert all(observer.seen for observer in seen)
    assert not torch.equal(rounded, before)
    assert (rounded - before).abs().mean() < 0.1 * before.abs().mean()
    assert torch.equal(model(**batch).logits, before)
    assert model.get_input_embeddings().weight is tied
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("kind", attention.GATES)
def test_gates_are_rounded_too(kind: str) -> None:
    model = bert(Variant(), attention.GateConfig(kind, std=0.5))
    gates = [m.gate for m in attention.attentions(model)]
    kept = [list(gate.weights) for gate in gates]
    seen: dict[int, torch.Tensor] = {}

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen[id(module)] = output.clone()

    for gate in gates:
        gate.register_forward_hook(note)
    before = model(input_ids=IDS).logits
    exact = dict(seen)
    with w8a8.weights(model):
        model(input_ids=IDS)
        for gate, weights in zip(gates, kept, strict=True):
            for weight, old in zip(gate.weights, weights, strict=True):
                torch.testing.assert_close(weight, w8a8.symmetric(old))
            assert not torch.equal(seen[id(gate)], exact[id(gate)])
    with w8a8.activations(model, [{"input_ids": IDS}], None) as observers:
        handles = [gate.register_forward_hook(note) for gate in gates]  # after the one that rounds
        model(input_ids=IDS)
        for handle in handles:
            handle.remove()
        for gate in gates:
            found = seen[id(gate)]
            torch.testing.assert_close(found, exact[id(gate)], atol=0.1, rtol=0)
            assert any(torch.equal(observer.rounded(found), found) for observer in observers)
    assert torch.equal(model(input_ids=IDS).logits, before)
    for gate, weights in zip(gates, kept, strict=True):
        assert all(a is b for a, b in zip(gate.weights, weights, strict=True))


@torch.no_grad()
def test_residual_sums_are_rounded_once_for_norm_and_branch() -> None:
    model = opt()
    seen = {}

    def note(module: nn.Module, args: Any) -> None:
        seen["norm"] = args[0].clone()

    block = measure.blocks(model)[1]
    with w8a8.activations(model, [{"input_ids": IDS}], None):
        # a hook that comes later sees what the one that rounds left
        handle = block.self_attn_layer_norm.register_forward_pre_hook(note)
        model(input_ids=IDS)
        handle.remove()
    assert len(seen["norm"].unique()) <= 256


@torch.no_grad()
def test_a_made_outlier_changes_nothing_but_the_ranges() -> None:
    model = opt()
    changed = measure.inject(model, 1000)
    wanted = model(input_ids=IDS).logits
    torch.testing.assert_close(changed(input_ids=IDS).logits, wanted, atol=1e-3, rtol=1e-3)
    worse = []
    for each in (model, changed):
        with w8a8.weights(each, True), w8a8.activations(each, [{"input_ids": IDS}], None, True):
            worse.append((each(input_ids=IDS).logits - wanted).abs().mean().item())
    assert worse[1] > 2 * worse[0]
