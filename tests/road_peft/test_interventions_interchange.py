"""Interchange interventions: activations of a source in the subspaces of a base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from road_peft import RoadInterventionConfig, RoadInterventionModel
from tests.helpers import assert_close
from tests.road_peft._interventions import HALVES, ROWS, dense, wrapped

IDS = torch.arange(3, 27).view(4, 6)
SOURCE = (IDS * 7 + 5) % 36 + 3
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def _states(model: RoadInterventionModel, ids: Tensor) -> Tensor:
    """Give what the first block of the base model gives."""
    kept: list[Tensor] = []
    block = model.base_model.model.layers[0]
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    model.base_model(input_ids=ids)
    handle.remove()
    return kept[0]


def _finish(model: RoadInterventionModel, states: Tensor, ids: Tensor) -> Tensor:
    """Give the logits when the first block gives `states`."""
    block = model.base_model.model.layers[0]
    handle = block.register_forward_hook(lambda module, args, output: states)
    try:
        return model.base_model(input_ids=ids).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("interchange", ["low", "high", "both"])
def test_the_source_gives_its_coordinates_in_the_rotated_pairs(
    variant: str, interchange: str
) -> None:
    model = wrapped(variant=variant, interchange=interchange, group_size=4, positions="f1+l1")
    base, source = _states(model, IDS), _states(model, SOURCE)
    half = torch.arange(16) % 4 < 2
    wanted = base.clone()
    for row, names in enumerate(ROWS):
        matrix = dense(model, names)
        inside = torch.tensor([set() != _owner(c) & set(names) for c in range(16)])
        taken = {"low": half, "high": ~half, "both": half | ~half}[interchange] & inside
        for token in (0, 5):
            b, s = (matrix @ states[row, token].double() for states in (base, source))
            mixed = torch.linalg.solve(matrix, torch.where(taken, s, b))
            wanted[row, token] = mixed.float()
    found = model(input_ids=IDS, subspaces=ROWS, sources={"input_ids": SOURCE}).logits
    assert_close(found, _finish(model, wanted, IDS), dtype=torch.float16)
    plain = model.base_model(input_ids=IDS).logits
    assert torch.equal(found[1], plain[1])
    assert not torch.allclose(found[0], plain[0])


def _owner(channel: int) -> set[str]:
    return {"lower" if channel < 8 else "upper"}


def test_interchanging_every_pair_whole_is_running_the_source() -> None:
    model = wrapped(layers=[1], interchange="both")
    found = model(input_ids=IDS, sources={"input_ids": SOURCE}).logits
    assert torch.equal(found[:, -1], model.base_model(input_ids=SOURCE).logits[:, -1])
    assert torch.equal(found[:, :-1], model.base_model(input_ids=IDS).logits[:, :-1])


def test_a_base_that_is_its_own_source_stays_as_it_is() -> None:
    model = wrapped(positions="all")
    found = model(input_ids=IDS, sources={"input_ids": IDS}).logits
    assert_close(found, model.base_model(input_ids=IDS).logits, dtype=torch.float16)


def test_tokens_correspond_by_position_whatever_the_padding() -> None:
    model = wrapped(positions="f1+l2")
    longer = torch.cat((torch.full((4, 2), 1), SOURCE, torch.full((4, 1), 1)), 1)
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0]).expand(4, -1)
    wanted = model(input_ids=IDS, subspaces=ROWS, sources={"input_ids": SOURCE}).logits
    sources = {"input_ids": longer, "attention_mask": mask}
    found = model(input_ids=IDS, subspaces=ROWS, sources=sources).logits
    assert_close(found, wanted, dtype=torch.float16)


@torch.no_grad()
def test_generation_interchanges_in_the_prompt() -> None:
    model = wrapped(positions="f1+l2", layers=[0, 1])
    given = {"subspaces": ROWS, "sources": {"input_ids": SOURCE}}
    wanted = model.generate(IDS, **given, **GREEDY)
    logits = model(input_ids=IDS, **given).logits[:, -1]
    logits[:, 1] = -torch.inf
    assert torch.equal(wanted[:, 6], logits.argmax(-1))
    for how in ({"prefill_chunk_size": 2}, {"prefill_chunk_size": 1}, {"use_cache": False}):
        assert torch.equal(model.generate(IDS, **given, **GREEDY, **how), wanted), how
    beams = model.generate(IDS, **given, **GREEDY, num_beams=2)
    for i, names in enumerate(ROWS):
        alone = model.generate(
            IDS[i : i + 1],
            subspaces=[names],
            sources={"input_ids": SOURCE[i : i + 1]},
            **GREEDY,
            num_beams=2,
        )
        assert torch.equal(beams[i], alone[0])


def test_what_cannot_be_interchanged_is_refused() -> None:
    model = wrapped(positions="all")
    with pytest.raises(ValueError, match="must be as many"):
        model(input_ids=IDS, sources={"input_ids": SOURCE[:, :5]})
    singular = wrapped(variant="road_4")
    with torch.no_grad():
        singular.sites[0].alpha[0].zero_()
    with pytest.raises(ValueError, match="singular block"):
        singular(input_ids=IDS, sources={"input_ids": SOURCE})
    singular(input_ids=IDS, subspaces=[["upper"]] * 4, sources={"input_ids": SOURCE})
    later = wrapped(prefill_only=False)
    with pytest.raises(ValueError, match="nothing for generated tokens"):
        later.generate(IDS, sources={"input_ids": SOURCE}, **GREEDY)


class _TwoVariables(nn.Module):
    """Holds two variables in each pair of features, along directions turned by an angle."""

    def __init__(self, angles: Tensor) -> None:
        super().__init__()
        turns = [torch.tensor([[a.cos(), a.sin()], [-a.sin(), a.cos()]]) for a in angles]
        self.encode = nn.Linear(2 * len(angles), 2 * len(angles), bias=False)
        self.decode = nn.Linear(2 * len(angles), 2 * len(angles), bias=False)
        with torch.no_grad():
            self.encode.weight.copy_(torch.block_diag(*turns))
            self.decode.weight.copy_(self.encode.weight.T)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.decode(self.encode(inputs_embeds))


def test_training_finds_the_direction_of_a_variable() -> None:
    """Interchange with the learnt direction changes the one variable and keeps the other."""
    angles = torch.tensor([0.7, -0.4])
    config = RoadInterventionConfig(
        component="encode", positions="all", subspaces={"one": [0], "two": [1]}
    )
    model = RoadInterventionModel(_TwoVariables(angles), config)
    optimizer = torch.optim.Adam(model.sites.parameters(), lr=0.05)

    def error(names: list[str]) -> Tensor:
        base, source = torch.randn(2, 16, 1, 4)
        wanted = base.clone()
        for name in names:  # the first variable of each pair is the one to interchange
            wanted[..., {"one": 0, "two": 2}[name]] = source[..., {"one": 0, "two": 2}[name]]
        given = {"subspaces": [names] * 16, "sources": {"inputs_embeds": source}}
        return (model(inputs_embeds=base, **given) - wanted).square().mean()

    before = error(["one", "two"])
    for _ in range(80):
        loss = error(["one"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    one, two = (p.item() for p in model.sites[0].theta)
    assert abs(abs(one) - 0.7) < 0.02
    assert two == 0  # it was idle
    assert error(["one"]) < 1e-3 < before
    for _ in range(80):
        loss = error(["two"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(["one", "two"]) < 1e-3


# ---- pyvene -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interchange", [None, "low", "both"])
def test_pyvene_computes_the_same(interchange: str | None) -> None:
    pyvene = pytest.importorskip("pyvene")
    from road_peft.interventions.pyvene_classes import RoadInterchange, RoadIntervention

    settings = {} if interchange is None else {"interchange": interchange}
    model = wrapped("gpt2", layers=[1], **settings)
    ids, rows = IDS[:3], [["lower"], ["upper"], ["lower", "upper"]]
    numbers = [[[0], [1], [0, 1]]]
    if interchange is None:
        module = RoadIntervention(16, HALVES)
        sources, where = None, {"base": [[[5]] * 3]}
        wanted = model(input_ids=ids, subspaces=rows).logits
    else:
        module = RoadInterchange(16, HALVES, **settings)
        sources = [{"input_ids": SOURCE[:3]}]
        where = {"sources->base": ([[[5]] * 3], [[[5]] * 3])}
        given = {"input_ids": SOURCE[:3]}
        wanted = model(input_ids=ids, subspaces=rows, sources=given).logits
    module.site.load_state_dict(model.sites[0].state_dict())
    representation = {
        "layer": 1,
        "component": "block_output",
        "unit": "pos",
        "max_number_of_units": 1,
        "intervention": module,
    }
    intervenable = pyvene.IntervenableModel(
        pyvene.IntervenableConfig([representation]), model.base_model
    )
    _, found = intervenable({"input_ids": ids}, sources, unit_locations=where, subspaces=numbers)
    assert torch.equal(found.logits, wanted)
    if interchange != "both":  # there the rotation cancels
        found.logits.square().sum().backward()
        assert all((p.grad != 0).any() for p in module.site.theta)
