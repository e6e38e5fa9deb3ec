"""The recipe's equations, counts and gates: identities, numbers by hand, and tiny models."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given as given_values
from hypothesis import settings as how
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from apiq_peft import ApiQConfig
from road_peft import RoadConfig
from tests.examples import _recipes

with _recipes.beside("neuron_specialization") as _modules:
    RECIPE: dict[str, ModuleType] = vars(_modules)
selection, masking, lass = RECIPE["selection"], RECIPE["masking"], RECIPE["lass"]
translator, directions, overlaps = RECIPE["translator"], RECIPE["directions"], RECIPE["overlaps"]
COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=12)


# ---- selection ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "k", "kept"),
    [
        ([1, 5, 3, 1], 50, [1]),  # 5 of 10 is half already
        ([1, 5, 3, 1], 51, [1, 2]),
        ([1, 5, 3, 1], 80, [1, 2]),
        ([1, 5, 3, 1], 81, [0, 1, 2]),  # of equals the first
        ([1, 5, 3, 1], 95, [0, 1, 2, 3]),
        ([0, 5, 0, 1], 100, [1, 3]),
        ([7], 1e-6, [0]),
        ([0, 0, 0], 95, [0]),
    ],
)
def test_the_shortest_beginning_that_reaches_k_is_kept(
    counts: list[int], k: float, kept: list[int]
) -> None:
    found = selection.select_cumulative(torch.tensor(counts), k)
    assert found.nonzero().flatten().tolist() == kept


@given_values(COUNTS, st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 9))
@how(max_examples=60, deadline=None)
def test_what_holds_for_every_selection(counts: list[int], a: float, b: float, c: int) -> None:
    values = torch.tensor(counts)
    small, large = (selection.select_cumulative(values, k) for k in sorted((a, b)))
    assert small.sum() >= 1
    assert (small <= large).all()
    every = selection.select_cumulative(values, 100)
    assert not values.any() or torch.equal(every, values > 0)
    # a scale: 16 is exact in floating point whatever k is
    assert torch.equal(
        selection.select_cumulative(values * 16, a), selection.select_cumulative(values, a)
    )
    assert torch.equal(
        selection.select_cumulative(values * c, 50), selection.select_cumulative(values, 50)
    )


def test_rows_are_selected_alone() -> None:
    counts = torch.randint(0, 9, (2, 3, 7))
    found = selection.select_cumulative(counts, 80)
    assert torch.equal(found[1, 2], selection.select_cumulative(counts[1, 2], 80))


@pytest.mark.parametrize("k", [0, -1, 101])
def test_k_is_a_percentage(k: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 100"):
        selection.select_cumulative(torch.ones(3), k)


def test_overlap_and_sparsity_by_hand() -> None:
    keep = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]).bool()
    table = selection.overlap(keep)
    assert table.tolist() == [[1, 1 / 3, 0.5], [1 / 3, 1, 0.5], [0.5, 0.5, 1]]
    assert selection.mean_overlap(table) == pytest.approx((1 / 3 + 0.5 + 0.5) / 3)
    assert selection.sparsity(keep).tolist() == [0.5, 0.5, 0]


def test_random_masks_keep_as_many_and_are_of_the_seed() -> None:
    keep = torch.rand(5, 40) < 0.6
    draw = torch.Generator().manual_seed(3)
    drawn = selection.random_like(keep, draw)
    assert torch.equal(drawn.sum(-1), keep.sum(-1))
    assert not torch.equal(drawn, keep)
    assert torch.equal(drawn, selection.random_like(keep, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("count", [2, 3, 14])
def test_a_shuffled_task_never_keeps_its_own_masks(count: int) -> None:
    for seed in range(5):
        order = selection.derangement(count, seed)
        assert sorted(order) == list(range(count))
        assert all(i != other for i, other in enumerate(order))
    with pytest.raises(ValueError, match="at least 2"):
        selection.derangement(1, 0)


def test_sampling_at_a_temperature() -> None:
    assert selection.sampling([3, 1], 1) == pytest.approx([0.75, 0.25])
    # 5 M, 1 M and 100 K pairs at T = 5, as in the paper's data
    shares = selection.sampling([5_000_000, 1_000_000, 100_000], 5)
    assert shares[0] / shares[2] == pytest.approx(50**0.2)
    assert shares == pytest.approx([0.4583, 0.3321, 0.2096], abs=1e-4)
    assert sum(shares) == pytest.approx(1)


def test_the_best_of_21_pairs_is_significant_and_the_second_is_not() -> None:
    table = torch.eye(7)
    table[0, 1] = table[1, 0] = 0.9
    difference, p = selection.permutation_p(table, [(0, 1)])
    assert difference == pytest.approx(0.9)
    assert p == pytest.approx(1 / 21)
    assert selection.permutation_p(table, [(2, 3)])[1] == 1
    table[5, 6] = table[6, 5] = 1.0
    assert selection.permutation_p(table, [(0, 1)])[1] == pytest.approx(2 / 21)


def test_more_tasks_than_can_be_enumerated() -> None:
    table = torch.rand(10, 10)
    table = (table + table.T) / 2
    table[0, 1] = table[1, 0] = 2.0
    p = selection.permutation_p(table, [(0, 1)], draws=450)[1]
    assert 1 / 451 <= p < 0.1  # it is 1/45


# ---- models ---------------------------------------------------------------------------------


def tiny_model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = translator.make_model(40, 1, 32, 64, 2, dropout, 24).eval()
    for name, value in model.named_parameters():
        if name.endswith("fc1.bias"):
            nn.init.normal_(value)
    return model


def inputs(rows: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 40, (2, rows, 6), generator=draw)
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "input_ids": ids[0],
        "attention_mask": mask,
        "decoder_input_ids": ids[1],
        "decoder_attention_mask": mask,
    }


def some_masks(model: Any, tasks: tuple[str, ...] = ("a-b", "b-a")) -> Any:
    draw = torch.Generator().manual_seed(2)
    layers = {
        ffn.name: torch.rand(len(tasks), 64, generator=draw) < 0.6
        for ffn in masking.find_ffns(model)
    }
    return masking.Table(tasks, layers)


TUNERS = {
    "full": lambda model: model,
    "road": lambda model: get_peft_model(
        model,
        RoadConfig(group_size=32, target_modules=["fc1", "fc2", "q_proj"], init_weights=False),
    ),
    "lora": lambda model: get_peft_model(
        model, LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False)
    ),
    "apiq": lambda model: get_peft_model(
        model, ApiQConfig(target_modules=["fc1", "fc2"], r=2, group_size=32)
    ),
}


@pytest.mark.parametrize("bias", ["kept", "masked"])
def test_a_gate_is_a_mask_on_the_rows_of_the_weight(bias: str) -> None:
    model, edited = tiny_model(), tiny_model()
    masks = some_masks(model)
    for ffn in masking.find_ffns(edited):
        keep = masks.layers[ffn.name][1]
        ffn.first[0].weight.data *= keep[:, None]
        if bias == "masked":
            ffn.first[0].bias.data *= keep
    with masking.NeuronGates(model, masks, bias) as gates, gates.active("b-a"):
        found = model(**inputs()).logits
    torch.testing.assert_close(found, edited(**inputs()).logits, rtol=1e-6, atol=1e-6)


def test_masked_rows_have_no_gradient_and_the_others_do() -> None:
    model = tiny_model()
    masks = some_masks(model)
    with masking.NeuronGates(model, masks) as gates, gates.active("a-b"):
        model(**inputs()).logits.square().mean().backward()
    for ffn in masking.find_ffns(model):
        moved = ffn.first[0].weight.grad.abs().sum(-1)
        keep = masks.layers[ffn.name][0]
        assert (moved[~keep] == 0).all()
        assert moved[keep].sum() > 0
        # its bias is not masked
        assert (ffn.first[0].bias.grad[~keep] != 0).any()


@pytest.mark.parametrize("tuner", TUNERS)
def test_all_kept_is_dense_and_mixed_batches_are_as_homogeneous_ones(tuner: str) -> None:
    model = TUNERS[tuner](tiny_model())
    model.eval()
    masks = some_masks(model)
    every = masking.Table(masks.tasks, {n: m | True for n, m in masks.layers.items()})
    plain = model(**inputs()).logits
    with masking.NeuronGates(model, every) as gates, gates.active("a-b"):
        assert torch.equal(model(**inputs()).logits, plain)
    with masking.NeuronGates(model, masks) as gates:
        with gates.active(["a-b", "b-a", "a-b"]):
            mixed = model(**inputs()).logits
        for row, task in enumerate(("a-b", "b-a", "a-b")):
            with gates.active(task):
                alone = model(**{k: v[row : row + 1] for k, v in inputs().items()}).logits
            torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(mixed, plain)
    assert torch.equal(model(**inputs()).logits, plain)  # nothing is left of it


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_mask_stands_outside_of_the_adapter(tuner: str) -> None:
    model = TUNERS[tuner](tiny_model())
    masks, seen = some_masks(model), {}
    for ffn in masking.find_ffns(model):
        ffn.second.register_forward_pre_hook(lambda _, x, n=ffn.name: seen.update({n: x[0]}))
    with masking.NeuronGates(model, masks, "masked") as gates, gates.active("a-b"):
        model.eval()(**inputs())
    for name, hidden in seen.items():
        keep = masks.layers[name][0]
        assert (hidden[..., ~keep] == 0).all()  # no partner of a rotation brings it back
        assert (hidden[..., keep] > 0).any()
    with masking.NeuronGates(model, masks) as gates, gates.active("a-b"):
        model(**inputs())
    for ffn in masking.find_ffns(model):
        layer = ffn.first[0]
        inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        keep = masks.layers[ffn.name][0]
        found = seen[ffn.name][..., ~keep]
        torch.testing.assert_close(found, inner.bias.relu()[~keep].expand_as(found))


def test_rows_are_repeated_for_beams() -> None:
    model = tiny_model()
    masks = some_masks(model)
    ids = {k: inputs(2)[k] for k in ("input_ids", "attention_mask")}
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with masking.NeuronGates(model, masks) as gates:
        with gates.active(["a-b", "b-a"]):
            mixed = model.generate(**ids, **options)
        for row, task in enumerate(("a-b", "b-a")):
            with gates.active(task):
                alone = model.generate(**{k: v[row : row + 1] for k, v in ids.items()}, **options)
            assert torch.equal(mixed[row], alone[0])


def test_gates_nest_survive_errors_and_checkpointing() -> None:
    model = tiny_model()
    masks = some_masks(model)
    with masking.NeuronGates(model, masks) as gates:
        with gates.active("a-b"):
            first = model(**inputs()).logits
            with pytest.raises(KeyError), gates.active("b-a"):
                raise KeyError
            assert torch.equal(model(**inputs()).logits, first)
        with pytest.raises(ValueError, match="no masks for 'fr-es'; there are for a-b, b-a"):
            gates.active("fr-es").__enter__()
        grads = []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable()
                model.train()  # dropout is zero
            with gates.active("a-b"):
                model(**inputs()).logits.square().mean().backward()
            grads.append(masking.find_ffns(model)[0].first[0].weight.grad.clone())
            model.zero_grad()
    torch.testing.assert_close(*grads)
    other = masking.Table(("a-b",), {"nowhere": torch.ones(1, 64).bool()})
    with pytest.raises(ValueError, match="masks are of another model"):
        masking.NeuronGates(model, other).__enter__()
    assert not any(ffn.first[0]._forward_hooks for ffn in masking.find_ffns(model))


# ---- counts ---------------------------------------------------------------------------------


def test_counts_are_those_of_real_tokens() -> None:
    model, seen = tiny_model(), {}
    for ffn in masking.find_ffns(model):
        ffn.second.register_forward_pre_hook(lambda _, x, n=ffn.name: seen.update({n: x[0] > 0}))
    batch = inputs()
    real = batch["attention_mask"].bool()
    for padding in (False, True):
        with masking.ActivationCounter(model, padding) as counter:
            for _ in range(2):
                with counter.over(batch["attention_mask"], batch["decoder_attention_mask"]):
                    model(**batch)
        assert set(counter.counts) == {"model.encoder.layers.0", "model.decoder.layers.0"}
        for name, counts in counter.counts.items():
            fired = seen[name] if padding else seen[name] & real[..., None]
            assert counts.dtype == torch.int64
            assert torch.equal(counts, 2 * fired.sum((0, 1)))
    model.train()
    with pytest.raises(ValueError, match="call eval"):
        masking.ActivationCounter(model).__enter__()


@pytest.mark.parametrize("tuner", ["road", "lora", "apiq"])
def test_names_of_blocks_are_those_of_the_plain_model(tuner: str) -> None:
    plain = [ffn.name for ffn in masking.find_ffns(tiny_model())]
    adapted = masking.find_ffns(TUNERS[tuner](tiny_model()))
    assert [ffn.name for ffn in adapted] == plain
    assert [ffn.side for ffn in adapted] == ["encoder", "decoder"]


def test_gated_blocks_count_and_mask_by_their_gate() -> None:
    from recipes_peft import tiny

    model = tiny.model().eval()
    ids = torch.arange(6)[None]
    with masking.ActivationCounter(model) as counter, counter.over(None, torch.ones_like(ids)):
        model(ids)
    layer, seen = model.model.layers[1].mlp, {}
    layer.gate_proj.register_forward_hook(lambda *a: seen.update(gate=a[2]))
    layer.down_proj.register_forward_pre_hook(lambda _, x: seen.update(hidden=x[0]))
    model(ids)
    assert torch.equal(counter.counts["model.layers.1.mlp"], (seen["gate"] > 0).sum((0, 1)))
    keep = torch.arange(128) % 3 > 0
    masks = masking.Table(("t",), {f"model.layers.{i}.mlp": keep[None] for i in (0, 1)})
    with masking.NeuronGates(model, masks) as gates, gates.active("t"):
        model(ids)
    assert (seen["hidden"][..., ~keep] == 0).all()
    assert (seen["hidden"][..., keep] != 0).any()
    with pytest.raises(ValueError, match="Linear has no feed-forward block of fc1/fc2 or wi/wo"):
        masking.find_ffns(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["counts", "masks"])
def test_tables_are_saved_and_read(kind: str, tmp_path: Path) -> None:
    counts = {"encoder.1": torch.randint(0, 99, (3, 13)), "decoder.1": torch.randint(0, 9, (3, 5))}
    table = masking.Table(("a-b", "b-a", "a-c"), counts)
    if kind == "masks":
        table = table.select(lambda task, layer: 50)
    masking.save(table, tmp_path / "table.safetensors")
    found = masking.load(tmp_path / "table.safetensors")
    assert found.tasks == table.tasks
    assert set(found.layers) == set(table.layers)
    assert all(torch.equal(found.layers[n], rows) for n, rows in table.layers.items())
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]


def test_k_is_chosen_by_task_and_block_and_controls_keep_sizes() -> None:
    counts = masking.Table(("a-b", "b-a"), {"encoder.0": torch.randint(1, 99, (2, 50))})
    keep = counts.select(lambda task, layer: {"a-b": 30, "b-a": 90}[task])
    assert torch.equal(
        keep.layers["encoder.0"][1], selection.select_cumulative(counts.layers["encoder.0"][1], 90)
    )
    sizes = keep.layers["encoder.0"].sum(-1)
    assert sizes[0] < sizes[1]
    assert torch.equal(keep.random(0).layers["encoder.0"].sum(-1), sizes)
    assert torch.equal(keep.shuffled(0).layers["encoder.0"], keep.layers["encoder.0"].flip(0))
    assert torch.equal((counts + counts).layers["encoder.0"], 2 * counts.layers["encoder.0"])


# ---- LaSS -----------------------------------------------------------------------------------


def test_the_largest_weights_are_kept() -> None:
    weight = torch.tensor([[0.1, -3.0], [2.0, -0.2]])
    assert lass.largest(weight, 0.5).tolist() == [[False, True], [True, False]]
    assert lass.largest(weight, 0.25).sum() == 3
    assert lass.largest(weight, 0.0).all()


def test_weights_are_masked_by_task_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def adapt(task: str) -> None:
        with torch.no_grad():
            for layer in lass.block_linears(model).values():
                layer.weight.normal_(generator=torch.Generator().manual_seed(len(task)))

    masks = lass.find(model, ["a", "bb"], 0.3, adapt, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "lm_head" not in masks["a"]
    # what is kept of a task is not searched again
    (tmp_path / "bb.safetensors").unlink()
    searched: list[str] = []
    again = lass.find(
        model, ["a", "bb"], 0.3, lambda task: searched.append(task) or adapt(task), tmp_path, False
    )
    assert searched == ["bb"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    for task, layers in masks.items():
        assert all(torch.equal(again[task][n], keep) for n, keep in layers.items())
    name = next(iter(masks["a"]))
    assert not torch.equal(masks["a"][name], masks["bb"][name])
    plain = model(**inputs()).logits
    gates = lass.WeightGates(model, masks)
    with gates.active("bb"):
        found = model(**inputs()).logits
        found.square().mean().backward()
    layers = lass.block_linears(model)
    assert all((layers[n].weight.grad[~keep] == 0).all() for n, keep in masks["bb"].items())
    for n, keep in masks["bb"].items():
        layers[n].weight.data *= keep
    torch.testing.assert_close(found, model(**inputs()).logits)
    assert not torch.allclose(found, plain)


# ---- what counts say ------------------------------------------------------------------------


def test_modularity_of_counts_made_by_hand() -> None:
    tasks = [directions.Task("en", x, "en") for x in "abcde"]
    tasks += [directions.Task(x, "en", "en") for x in "abcde"]
    names = tuple(task.name for task in tasks)
    # neurons 0-9 fire for all; each language has ten of its own, and a and b share theirs
    own = torch.zeros(10, 60, dtype=torch.long)
    for i, task in enumerate(tasks):
        place = max(1, "abcde".index(task.language)) * 10
        own[i, place : place + 10] = 10
    shared = torch.zeros(10, 60, dtype=torch.long)
    shared[:, :10] = 10
    layers = {
        "encoder.layers.10": shared,
        "encoder.layers.2": own + shared,
        "decoder.layers.2": shared,
        "decoder.layers.10": own + shared,
    }
    table = masking.Table(names, layers)
    found = overlaps.modularity((table, table), tasks, [["a", "b"]], 100)
    assert found["same_task"] == 1
    # of 10 pairs one overlaps fully, the others in 10 of 30 neurons
    mean = (1 + 9 / 3) / 10
    assert found["encoder_mean"] == pytest.approx([mean, 1])
    assert found["decoder_mean"] == pytest.approx([1, mean])
    assert found["cross_task"] == pytest.approx(mean)
    for place in ("first_encoder", "last_decoder"):
        assert found[place] == pytest.approx({"difference": 2 / 3, "p": 0.1})
    # with 5 languages one pair can not be significant, with 4 that is not asked for
    assert list(overlaps.promised(found, 5).values()) == [True, True, False, False]
    assert list(overlaps.promised(found, 4).values()) == [True, True, True, True]
