"""Interventions in forward and generate: rows, tokens, padding, modules, and the base beside."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from road_peft import RoadConfig, RoadInterventionConfig, RoadInterventionModel
from tests.helpers import assert_close
from tests.road_peft._interventions import HALVES, ROWS, by_hand, dense, randomized, wrapped
from tests.road_peft._models import VOCABULARY, bytes_of, randomize, tiny

IDS = torch.arange(3, 27).view(4, 6) % VOCABULARY
LAST = torch.zeros(4, 6, dtype=torch.bool).index_fill(1, torch.tensor([5]), True)
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


# ---- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "group_size"), [("road_1", 2), ("road_1", 8), ("road_2", 4), ("road_4", 2)]
)
def test_each_row_is_rotated_by_its_subspaces(variant: str, group_size: int) -> None:
    model = wrapped(variant=variant, group_size=group_size)
    block = model.base_model.model.layers[0]
    wanted = by_hand(model, block, LAST, ROWS, input_ids=IDS)
    found = model(input_ids=IDS, subspaces=ROWS).logits
    base = model.base_model(input_ids=IDS).logits
    assert_close(found, wanted)
    assert torch.equal(found[1], base[1])
    assert torch.equal(found[:, :-1], base[:, :-1])
    assert not torch.equal(found[0], base[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_rows_of_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model = wrapped(dtype=dtype)
    found = model(input_ids=IDS, subspaces=ROWS).logits
    base = model.base_model(input_ids=IDS).logits
    assert found.dtype == dtype
    assert torch.equal(found[1], base[1])
    assert not torch.equal(found[3], base[3])


@pytest.mark.parametrize(
    ("name", "component", "path"),
    [
        ("llama", "attention_output", "model.layers.0.self_attn"),
        ("llama", "mlp_output", "model.layers.0.mlp"),
        ("llama", "self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("gpt2", "block_output", "transformer.h.0"),
        ("gpt2", "attention_output", "transformer.h.0.attn"),
        ("gpt2", "mlp.c_fc", "transformer.h.0.mlp.c_fc"),
        ("opt", "fc2", "model.decoder.layers.0.fc2"),
        ("bert classifier", "block_output", "bert.encoder.layer.0"),
    ],
)
def test_modules_are_found_by_component_or_path(name: str, component: str, path: str) -> None:
    model = wrapped(name, component=component, positions="all")
    ids = IDS.clone()
    wanted = by_hand(
        model, model.base_model.get_submodule(path), torch.ones_like(LAST), ROWS, input_ids=ids
    )
    assert_close(model(input_ids=ids, subspaces=ROWS).logits, wanted)
    by_path = RoadInterventionConfig(component=path, positions="all", subspaces=HALVES)
    other = RoadInterventionModel(model.base_model, by_path)
    other.sites.load_state_dict(model.sites.state_dict())
    assert_close(other(input_ids=ids, subspaces=ROWS).logits, wanted)


def test_several_layers_each_have_their_own_rotation() -> None:
    model = wrapped(layers=[1, 0], positions="all")
    blocks = model.base_model.model.layers
    where = torch.ones_like(LAST)
    one = RoadInterventionConfig(layers=[0], positions="all", subspaces=HALVES)
    first = RoadInterventionModel(model.base_model, one)
    first.sites[0].load_state_dict(model.sites[1].state_dict())

    def second(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        matrices = torch.stack([dense(model, names) for names in ROWS])
        return torch.einsum("rij,rtj->rti", matrices, output.double()).float()

    handle = blocks[1].register_forward_hook(second)
    wanted = by_hand(first, blocks[0], where, ROWS, input_ids=IDS)
    handle.remove()
    assert_close(model(input_ids=IDS, subspaces=ROWS).logits, wanted)


def test_without_names_every_subspace_acts_on_every_row() -> None:
    model = wrapped()
    every = model(input_ids=IDS, subspaces=[["lower", "upper"]] * 4).logits
    assert torch.equal(model(input_ids=IDS).logits, every)


def test_disjoint_subspaces_commute_and_add_up_exactly() -> None:
    """The identities of composition: S then T, T then S and both at once are the same numbers."""
    model = wrapped(component="mlp_output", positions="all")
    (site,) = model.sites
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: kept.__setitem__(name, output.detach())

    handle = model.base_model.model.layers[0].mlp.register_forward_hook(keep("out"))
    out = {}
    for names in ((), ("lower",), ("upper",), ("lower", "upper")):
        model(input_ids=IDS, subspaces=[list(names)] * 4)
        out[names] = kept["out"]
    handle.remove()
    h, low, high, both = out.values()
    assert torch.equal(both - h, (low - h) + (high - h))
    half = site.features // 2
    assert torch.equal(both[..., :half], low[..., :half])
    assert torch.equal(both[..., half:], high[..., half:])
    assert torch.equal(low[..., half:], h[..., half:])
    assert not torch.equal(low[..., :half], h[..., :half])


@pytest.mark.parametrize(
    "positions", ["l1", "f1", "f2+l2", "all", lambda mask: mask.cumsum(1) == 2]
)
def test_padding_on_either_side_changes_nothing(positions: Any) -> None:
    model = wrapped(positions=positions)
    lengths, width = [3, 6, 4, 5], 6
    left, right = (torch.full((4, width), 1) for _ in range(2))
    left_mask, right_mask = torch.zeros_like(left), torch.zeros_like(right)
    for i, n in enumerate(lengths):
        left[i, width - n :] = right[i, :n] = IDS[i, :n]
        left_mask[i, width - n :] = right_mask[i, :n] = 1
    on_left = model(input_ids=left, attention_mask=left_mask, subspaces=ROWS).logits
    on_right = model(input_ids=right, attention_mask=right_mask, subspaces=ROWS).logits
    for i, n in enumerate(lengths):
        alone = model(input_ids=IDS[i : i + 1, :n], subspaces=[ROWS[i]]).logits[0]
        assert_close(on_right[i, :n], alone, dtype=torch.float16)
        assert_close(on_left[i, width - n :], alone, dtype=torch.float16)


def test_an_encoder_takes_the_real_tokens_of_its_mask() -> None:
    model = wrapped("bert classifier", positions="l1")
    mask = torch.ones_like(IDS)
    mask[:, 4:] = 0
    where = torch.zeros_like(LAST)
    where[:, 3] = True
    block = model.base_model.bert.encoder.layer[0]
    wanted = by_hand(model, block, where, ROWS, input_ids=IDS, attention_mask=mask)
    found = model(input_ids=IDS, attention_mask=mask, subspaces=ROWS).logits
    assert_close(found, wanted)


def test_labels_tell_the_prompt() -> None:
    model = wrapped()
    labels = IDS.clone()
    labels[:, :3] = -100
    where = torch.zeros_like(LAST)
    where[:, 2] = True
    block = model.base_model.model.layers[0]
    wanted = by_hand(model, block, where, ROWS, input_ids=IDS)
    assert_close(model(input_ids=IDS, labels=labels, subspaces=ROWS).logits, wanted)
    prompt = (labels == -100).long()
    assert_close(model(input_ids=IDS, prompt_mask=prompt, subspaces=ROWS).logits, wanted)
    with pytest.raises(ValueError, match="labels of the prompt"):
        model(input_ids=IDS, labels=IDS, subspaces=ROWS)


@torch.no_grad()
def test_chunks_and_steps_computed_by_hand_need_to_know_the_prompt() -> None:
    model = wrapped(positions="f2+l1")
    prompt = torch.ones(4, 4, dtype=torch.int64)  # then two tokens that are not of it
    wanted = model(input_ids=IDS, prompt_mask=prompt, subspaces=ROWS).logits
    cache, parts = None, []
    for columns in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)):
        given = {"input_ids": IDS[:, columns], "subspaces": ROWS, "past_key_values": cache}
        if cache is not None:
            with pytest.raises(ValueError, match=r"the cache holds \d tokens: give prompt_mask"):
                model(**given)
        out = model(**given, prompt_mask=prompt, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert_close(torch.cat(parts, 1), wanted, dtype=torch.float16)


# ---- generate -----------------------------------------------------------------------------------


def _tokens_by_hand(model: RoadInterventionModel, row: int, steps: int) -> list[int]:
    """Decode greedily without a cache, rotating the last token of the prompt by a matrix."""
    ids = IDS[row : row + 1]
    for _ in range(steps):
        where = torch.zeros(ids.shape, dtype=torch.bool)
        where[:, IDS.shape[1] - 1] = True
        block = model.base_model.model.layers[0]
        logits = by_hand(model, block, where, [ROWS[row]], input_ids=ids)
        logits[..., 1] = -torch.inf  # the token that ends
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids[0].tolist()


@torch.no_grad()
def test_generation_intervenes_on_the_prompt_only() -> None:
    model = wrapped()
    found = model.generate(IDS, subspaces=ROWS, **GREEDY)
    assert found.tolist() == [_tokens_by_hand(model, row, 5) for row in range(4)]


@pytest.mark.parametrize("positions", ["l1", "f2+l2", "all"])
@pytest.mark.parametrize("prefill_only", [True, False])
@torch.no_grad()
def test_however_the_prompt_is_computed_the_tokens_are_the_same(
    positions: str, prefill_only: bool
) -> None:
    model = wrapped(positions=positions, prefill_only=prefill_only, layers=[0, 1])
    wanted = model.generate(IDS, subspaces=ROWS, **GREEDY)
    for how in ({"prefill_chunk_size": 2}, {"prefill_chunk_size": 1}, {"use_cache": False}):
        assert torch.equal(model.generate(IDS, subspaces=ROWS, **GREEDY, **how), wanted), how
    if prefill_only:
        return
    logits = model(
        input_ids=wanted, prompt_mask=torch.arange(11).expand(4, -1) < 6, subspaces=ROWS
    ).logits
    logits[..., 1] = -torch.inf
    assert torch.equal(logits[:, 5:-1].argmax(-1), wanted[:, 6:])  # one pass agrees with steps


@torch.no_grad()
def test_a_prompt_of_one_token_is_a_prompt() -> None:
    model = wrapped(positions="l1")
    ids = IDS[:, :1]
    first = model.generate(ids, subspaces=ROWS, **GREEDY)[:, 1]
    logits = model(input_ids=ids, subspaces=ROWS).logits[:, -1]
    logits[..., 1] = -torch.inf
    assert torch.equal(first, logits.argmax(-1))
    again = model.generate(ids, subspaces=ROWS, use_cache=False, **GREEDY)
    assert torch.equal(again, model.generate(ids, subspaces=ROWS, **GREEDY))


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@torch.no_grad()
def test_beams_follow_the_row_they_come_from(how: dict[str, int]) -> None:
    model = wrapped(positions="f1+l1")
    together = model.generate(IDS, subspaces=ROWS, **GREEDY, **how)
    copies = len(together) // 4
    for i, names in enumerate(ROWS):
        alone = model.generate(IDS[i : i + 1], subspaces=[names], **GREEDY, **how)
        assert torch.equal(together[i * copies : (i + 1) * copies], alone)
    base = model.base_model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY, **how)
    assert torch.equal(together[copies : 2 * copies], base[copies : 2 * copies])


@torch.no_grad()
def test_left_padded_prompts_generate_what_each_does_alone() -> None:
    model = wrapped(positions="f1+l1")
    ids, mask = torch.full((4, 8), 1), torch.zeros(4, 8, dtype=torch.int64)
    for i in range(4):
        ids[i, 2 + i :], mask[i, 2 + i :] = IDS[i, i:], 1
    found = model.generate(ids, attention_mask=mask, subspaces=ROWS, **GREEDY)
    for i, names in enumerate(ROWS):
        alone = model.generate(IDS[i : i + 1, i:], subspaces=[names], **GREEDY)
        assert torch.equal(found[i, 8:], alone[0, 6 - i :])
    with pytest.raises(ValueError, match="padding token 1"):
        model.generate(ids, subspaces=ROWS, **GREEDY)


# ---- the model beside ---------------------------------------------------------------------------


def test_the_base_model_itself_computes_as_ever() -> None:
    base = tiny("llama")
    before, bytes_before = base(input_ids=IDS).logits, bytes_of(base)
    model = wrapped(base)
    model(input_ids=IDS)
    assert torch.equal(base(input_ids=IDS).logits, before)
    assert bytes_of(base) == bytes_before
    assert not any(p.requires_grad for p in base.parameters())
    assert model.detach() is base
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_an_exception_leaves_nothing_in_force() -> None:
    model = wrapped()
    base = model.base_model
    before = base(input_ids=IDS).logits

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = base.model.layers[1].register_forward_pre_hook(fail)
    for call in (model, model.generate):
        with pytest.raises(RuntimeError, match="on purpose"):
            call(IDS, subspaces=ROWS)
    handle.remove()
    assert torch.equal(base(input_ids=IDS).logits, before)


@torch.no_grad()
def test_two_threads_each_have_their_rows() -> None:
    model = wrapped()
    rows = {0: [["lower"]] * 4, 1: [["upper"]] * 4}
    wanted = {i: model.generate(IDS, subspaces=names, **GREEDY) for i, names in rows.items()}
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = [model.generate(IDS, subspaces=rows[i], **GREEDY) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(t, wanted[i]) for i in rows for t in found[i])
    assert all(len(f) == 3 for f in found.values())


def test_a_copy_has_values_and_hooks_of_its_own() -> None:
    model = wrapped()
    before = model(input_ids=IDS, subspaces=ROWS).logits
    other = randomized(copy.deepcopy(model))
    changed = other(input_ids=IDS, subspaces=ROWS).logits
    assert torch.equal(model(input_ids=IDS, subspaces=ROWS).logits, before)
    assert not torch.equal(changed[0], before[0])
    assert torch.equal(changed[1], before[1])


@torch.no_grad()
def test_adapters_by_row_work_underneath() -> None:
    base = randomize(get_peft_model(tiny("llama"), RoadConfig(group_size=4)))
    model = wrapped(base)
    names = ["default", "__base__", "__base__", "default"]
    found = model(input_ids=IDS, adapter_names=names, subspaces=ROWS).logits
    for i, name in enumerate(names):
        alone = model(input_ids=IDS[i : i + 1], adapter_names=[name], subspaces=[ROWS[i]]).logits
        assert_close(found[i], alone[0], dtype=torch.float16)
    plain = base(input_ids=IDS, adapter_names=names).logits
    assert torch.equal(found[1], plain[1])
    tokens = model.generate(IDS, adapter_names=names, subspaces=ROWS, **GREEDY)
    for i, name in enumerate(names):
        alone = model.generate(IDS[i : i + 1], adapter_names=[name], subspaces=[ROWS[i]], **GREEDY)
        assert torch.equal(tokens[i], alone[0])
