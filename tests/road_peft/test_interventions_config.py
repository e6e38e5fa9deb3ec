"""What a configuration of interventions may say, and what each refusal tells."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from road_peft import RoadInterventionConfig, RoadInterventionModel
from road_peft.interventions.positions import select, select_in_sequence
from road_peft.interventions.subspaces import atoms_of, blocks_of, channels_of
from tests.road_peft._interventions import wrapped
from tests.road_peft._models import tiny

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
IDS = torch.arange(3, 15).view(2, 6)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        ("l1", ["00001", "00010", "01000", "00001"]),
        ("f1", ["00100", "10000", "01000", "10000"]),
        ("l2", ["00011", "00110", "01000", "00101"]),
        ("f2+l1", ["00111", "11010", "01000", "10101"]),
        ("all", ["00111", "11110", "01000", "10101"]),
        (lambda mask: torch.ones_like(mask), ["00111", "11110", "01000", "10101"]),
    ],
)
def test_positions_count_real_tokens(positions: Any, chosen: list[str]) -> None:
    found = select(positions, MASK)
    assert ["".join(str(int(v)) for v in row) for row in found] == chosen


def test_tokens_after_the_prompt_count_as_they_did_when_they_were_last() -> None:
    mask, prompt = torch.ones(1, 5).bool(), torch.tensor([[1, 1, 0, 0, 0]]).bool()
    for positions, later in (("l1", [1, 1, 1]), ("f3", [1, 0, 0]), ("f1", [0, 0, 0])):
        found = select_in_sequence(positions, mask, prompt, False)
        assert found[0, 2:].int().tolist() == later
        assert torch.equal(found[:, :2], select(positions, prompt)[:, :2])
        only = select_in_sequence(positions, mask, prompt, True)
        assert not only[0, 2:].any()


def test_a_share_is_channels_and_a_list_is_blocks() -> None:
    config = RoadInterventionConfig(
        group_size=4, subspaces={"first": (0, 0.25), "rest": (0.5, 1.0), "few": [2, 3]}
    )
    blocks = blocks_of(config, 16, "here")
    assert blocks == {"first": [0, 1], "rest": [4, 5, 6, 7], "few": [2, 3]}
    assert channels_of(blocks["first"], 4).tolist() == [0, 2, 1, 3]
    assert channels_of([3, 5], 2).tolist() == [6, 7, 10, 11]
    assert channels_of([9], 16).tolist() == [17, 25]
    thirds = RoadInterventionConfig(subspaces={str(i): (i / 3, (i + 1) / 3) for i in range(3)})
    assert list(blocks_of(thirds, 18, "here").values()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_shared_blocks_are_parts_of_their_own() -> None:
    config = RoadInterventionConfig(
        subspaces={"a": [0, 1, 2], "b": [2, 3], "c": [7]}, allow_overlap=True
    )
    parts = atoms_of(blocks_of(config, 16, "here"))
    assert parts == {("a",): [0, 1], ("a", "b"): [2], ("b",): [3], ("c",): [7]}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "variant": ({"variant": "road_3"}, "choose from"),
    "odd group": ({"group_size": 3}, "even and positive"),
    "interchange": ({"interchange": "left"}, "interchange is 'left'"),
    "no subspaces": ({"subspaces": {}}, "no subspaces"),
    "empty name": ({"subspaces": {"": [0]}}, "cannot name"),
    "share": ({"subspaces": {"a": (0.5, 0.2)}}, "start < end"),
    "three ends": ({"subspaces": {"a": (0, 0.2, 1)}}, "start < end"),
    "float blocks": ({"subspaces": {"a": [0.5, 1]}}, "block numbers"),
    "negative block": ({"subspaces": {"a": [-1]}}, "block numbers"),
    "no blocks": ({"subspaces": {"a": []}}, "must be some"),
    "twice": ({"subspaces": {"a": [1, 1]}}, "different"),
    "no layers": ({"layers": []}, "different numbers"),
    "same layer": ({"layers": [1, 1]}, "different numbers"),
    "positions": ({"positions": "l0"}, "positions is 'l0'"),
    "no positions": ({"positions": ""}, "positions is ''"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_field_is_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        RoadInterventionConfig(**fields)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "cut group": ({"group_size": 8, "subspaces": {"a": (0, 0.25)}}, "cuts a group"),
    "group": ({"group_size": 6}, "no whole groups"),
    "block": ({"subspaces": {"a": [8]}}, "has block 8, but 16 features make 8 blocks"),
    "overlap": ({"subspaces": {"a": (0, 0.5), "b": [3]}}, "'a' and 'b' share block 3"),
    "layer": ({"layers": [2]}, "the model has 2 blocks"),
    "component": ({"component": "mlp.none"}, "block 0 has no module 'mlp.none'; give .*mlp.up"),
    "path": ({"layers": None, "component": "nowhere"}, "the model has no module 'nowhere'"),
    "no layers": ({"layers": None}, "without layers"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_a_model_lacks_is_refused_and_nothing_is_left_on_it(case: str) -> None:
    fields, message = UNFIT[case]
    base = tiny("llama")
    with pytest.raises(ValueError, match=message):
        RoadInterventionModel(base, RoadInterventionConfig(**{"layers": [0], **fields}))
    assert all(p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks for m in base.modules())


def test_models_without_the_parts_say_what_to_name() -> None:
    with pytest.raises(ValueError, match=r"none of mlp, .*fc1"):
        wrapped("opt", component="mlp_output")
    with pytest.raises(ValueError, match="get_encoder"):
        wrapped("t5")
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    with pytest.raises(ValueError, match=r"no config\.hidden_size; name a linear layer"):
        RoadInterventionModel(plain, RoadInterventionConfig(component="1"))
    with pytest.raises(ValueError, match="cannot be told"):
        RoadInterventionModel(plain, RoadInterventionConfig(layers=[0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subspaces": [["lower"]]}, "2 rows but 1 lists"),
        ({"subspaces": ["lower", "upper"]}, "one list of names for each row"),
        ({"subspaces": [["lower"], ["middle"]]}, r"\['middle'\] do not exist"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask is \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"must be a mask of \(2, 6\)"),
        ({"prompt_mask": torch.ones(3, 6)}, "prompt_mask must be a mask of"),
        ({"sources": {"input_ids": IDS[:1]}}, "1 rows and the inputs 2"),
    ],
)
def test_calls_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped()(input_ids=IDS, **given)


def test_other_wrong_calls_are_refused() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[5, 6]])
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model.generate(IDS, attention_mask=torch.ones(2, 1, 6, 6))
    bad = wrapped(positions=lambda mask: mask[:, :1])
    with pytest.raises(ValueError, match="function of positions gave"):
        bad(input_ids=IDS)
    inner = wrapped(component="mlp.act_fn")  # as wide as the layers around it, not as the states
    with pytest.raises(ValueError, match=r"24\) instead of states of 16 features"):
        inner(input_ids=IDS)


def test_a_configuration_goes_through_json() -> None:
    config = RoadInterventionConfig(
        layers=[1],
        component="mlp_output",
        positions="f1+l2",
        variant="road_2",
        group_size=4,
        subspaces={"a": (0, 1 / 3), "b": [5, 4], "c": (0.5, 1)},
        prefill_only=False,
        interchange="high",
    )
    assert RoadInterventionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    whole = RoadInterventionConfig(subspaces={"all": (0, 1), "two": [0, 1]}, allow_overlap=True)
    assert RoadInterventionConfig.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    with pytest.raises(ValueError, match="unknown field"):
        RoadInterventionConfig.from_dict({"colour": 1})
