"""One adapted layer: what it computes, its gradients, its parameters and its memory.

| property                                     | oracle                                            |
|----------------------------------------------|---------------------------------------------------|
| outputs of the golden cases                  | numbers computed by hand, bias included           |
| z = R (W x + b) + s B A x                    | dense R by hand; complex numbers for road_1       |
| gradients                                    | autograd of the dense form, gradcheck             |
| stock PEFT                                   | its outputs and gradients, float32                |
| a fresh adapter, a disabled adapter          | the base layer, bit for bit                       |
| the tail under remainder='identity'          | the base layer, bit for bit                       |
| dtypes of parameters and outputs             | a table                                           |
| bytes kept for the backward                  | what autograd saves, against one output           |
| rotating queries and keys beside RoPE        | commutes at g = head_dim, not at g = 2            |
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from road_peft import RoadConfig, RoadLayer
from tests.helpers import GOLDEN, TOLERANCES, Golden, assert_close, dense_rotation
from tests.road_peft._models import (
    LIBRARIES,
    Mlp,
    adapted,
    by_hand,
    bytes_of,
    layer_of,
    randomize,
    registered,
    set_values,
    tiny,
    with_adapters,
)
from tests.road_peft.test_weights import ALPHA, MERGED, THETA, B, W

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
VARIANTS = ("road_1", "road_2", "road_4")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def _dense(layer: RoadLayer, name: str = "default") -> Tensor:
    """Write R of one adapter of a layer as a float64 matrix, from the parameters it has."""
    theta, alpha = layer.road_theta[name].double(), layer.road_alpha[name].double()
    group = layer.group_size[name]
    return dense_rotation(
        *by_hand(layer.variant[name], theta, alpha, group), group, layer.out_features
    )


# ---- numbers computed by hand -----------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c.variant}-{c.group_size}")
def test_golden_numbers_through_a_layer(case: Golden) -> None:
    """The base layer has weight 2 and takes half of h: its bias makes up the rest."""
    h = torch.tensor(case.h)
    layer = layer_of(_linear(torch.diag(h), -h), variant=case.variant, group_size=case.group_size)
    set_values(layer, case.theta, case.alpha)
    z = layer(torch.full((1, len(h)), 2.0))
    assert_close(z[0], torch.tensor(case.z))


@pytest.mark.parametrize(
    ("group", "z"),
    [(2, (14.990381, 4.035898, -1, 2.5)), (4, (7.990381, -1, 16.160254, -1))],
)
def test_golden_numbers_of_a_layer_with_bias(group: int, z: tuple[float, ...]) -> None:
    layer = layer_of(_linear(W, B), group_size=group)
    set_values(layer, THETA, ALPHA)
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    assert_close(layer(x)[0], torch.tensor(z, dtype=torch.float64), dtype=torch.float32)
    layer.merge()
    weight, bias = (torch.tensor(v, dtype=torch.float64) for v in MERGED[group])
    assert_close(layer.get_base_layer().weight, weight)
    assert_close(layer.get_base_layer().bias, bias)
    assert_close(layer(x)[0], torch.tensor(z, dtype=torch.float64), dtype=torch.float32)


# ---- dense matrices and complex numbers -------------------------------------------------------

# kind: the base layer with 10 inputs, and an input of it
BASES: dict[str, Any] = {
    "linear": lambda out, dtype: (nn.Linear(10, out, dtype=dtype), torch.randn(3, 5, 10).to(dtype)),
    "no bias": lambda out, dtype: (
        nn.Linear(10, out, bias=False, dtype=dtype),
        torch.randn(2, 10).to(dtype),
    ),
    "conv1d": lambda out, dtype: (Conv1D(out, 10).to(dtype), torch.randn(3, 5, 10).to(dtype)),
    "embedding": lambda out, dtype: (
        nn.Embedding(10, out, dtype=dtype),
        torch.tensor([[1, 9, 0], [3, 3, 7]]),
    ),
    "one row": lambda out, dtype: (nn.Linear(10, out, dtype=dtype), torch.randn(10).to(dtype)),
    "empty": lambda out, dtype: (nn.Linear(10, out, dtype=dtype), torch.randn(0, 10).to(dtype)),
    "strided": lambda out, dtype: (
        nn.Linear(10, out, dtype=dtype),
        torch.randn(10, 5, 3).to(dtype).transpose(0, 2),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", BASES)
def test_a_layer_is_the_dense_rotation_of_its_base(kind: str, variant: str, dtype) -> None:
    base, x = BASES[kind](12, dtype)
    layer = layer_of(base, variant=variant)
    h = base(x)
    z = layer(x)
    assert z.dtype == dtype
    assert_close(z, h.double() @ _dense(layer).T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_and_a_disabled_one_are_the_base_layer_bit_for_bit(variant: str) -> None:
    base, x = nn.Linear(6, 8), torch.randn(5, 6)
    wanted = base(x)
    layer = layer_of(base, variant=variant, lora_rank=2)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), wanted)
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), wanted)
    layer.reset_parameters("default")
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_road_1_multiplies_complex_numbers(group: int) -> None:
    base, x = nn.Linear(6, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    layer = layer_of(base, group_size=group)
    theta, alpha = layer.road_theta["default"], layer.road_alpha["default"]
    low, high = base(x).view(5, -1, 2, group // 2).unbind(2)
    turned = torch.complex(low, high) * torch.polar(alpha, theta).view(-1, group // 2)
    wanted = torch.stack((turned.real, turned.imag), 2).reshape(5, 8)
    assert_close(layer(x), wanted)


def test_several_active_adapters_rotate_in_the_order_in_which_they_were_set() -> None:
    config = RoadConfig(target_modules=["up"], group_size=4, variant="road_2")
    other = RoadConfig(target_modules=["up"], group_size=8, variant="road_4")
    model = with_adapters(Mlp().double(), {"one": config, "two": other})
    (layer,) = adapted(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    h, one, two = layer.base_layer(x), _dense(layer, "one"), _dense(layer, "two")
    model.base_model.set_adapter(["one", "two"])
    forward = layer(x)
    assert_close(forward, h @ one.T @ two.T)
    model.base_model.set_adapter(["two", "one"])
    assert_close(layer(x), h @ two.T @ one.T)
    assert (layer(x) - forward).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_delta_of_a_lora_beside_is_not_rotated(kind: str) -> None:
    base, x = BASES[kind](12, torch.float64)
    layer = layer_of(base, lora_rank=2, lora_alpha=3)
    delta = layer.road_lora_B["default"] @ layer.road_lora_A["default"] * 1.5
    wanted = base(x) @ _dense(layer).T + x @ delta.T
    assert_close(layer(x), wanted)


def test_deltas_of_several_adapters_add_up_after_all_rotations() -> None:
    config = {"target_modules": ["up"], "variant": "road_2"}
    model = with_adapters(
        Mlp().double(),
        {
            "one": RoadConfig(**config, group_size=4, lora_rank=2),
            "two": RoadConfig(**config, group_size=8, lora_rank=3, lora_alpha=6),
        },
    )
    model.base_model.set_adapter(["one", "two"])
    (layer,) = adapted(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    a, b = layer.road_lora_A, layer.road_lora_B
    deltas = 8 * b["one"] @ a["one"] + 2 * b["two"] @ a["two"]
    wanted = layer.base_layer(x) @ _dense(layer, "one").T @ _dense(layer, "two").T + x @ deltas.T
    assert_close(layer(x), wanted)


def test_an_adapter_replaced_by_one_without_a_lora_has_none() -> None:
    base, x = nn.Linear(6, 8), torch.randn(3, 6)
    layer = layer_of(base, lora_rank=2)
    layer.update_layer("default", variant="road_1", group_size=4)
    assert torch.equal(layer(x), base(x))
    assert not any("lora" in name for name, _ in layer.named_parameters())


def test_dropout_acts_on_the_lora_in_training_only() -> None:
    layer = layer_of(nn.Linear(6, 8), lora_rank=2, lora_dropout=0.5)
    x = torch.ones(4, 6)
    evaluated = layer.eval()(x)
    assert torch.equal(layer(x), evaluated)
    assert not torch.equal(layer.train()(x), evaluated)
    with torch.no_grad():
        layer.road_lora_B["default"].zero_()
    assert_close(layer(x), layer.eval()(x))  # the rotation has no dropout


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tail_after_the_last_whole_group_is_the_base_bit_for_bit(variant: str, dtype) -> None:
    base, x = nn.Linear(6, 11, dtype=dtype), torch.randn(3, 6).to(dtype)
    layer = layer_of(base, variant=variant, group_size=4, remainder="identity")
    h, z = base(x), layer(x)
    assert torch.equal(z[:, 8:], h[:, 8:])
    assert_close(z, h.double() @ _dense(layer).T)
    assert not torch.equal(z[:, :8], h[:, :8])
    layer.merge()
    assert_close(layer(x), z)
    layer.unmerge()
    assert torch.equal(layer(x), z)


# ---- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "recompute"), [*((variant, False) for variant in VARIANTS), ("road_1", True)]
)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "strided"])
def test_gradients_are_those_of_the_dense_form(kind: str, variant: str, recompute: bool) -> None:
    base, x = BASES[kind](12, torch.float64)
    if x.is_floating_point():
        x = x.requires_grad_()
    layer = layer_of(base, variant=variant, recompute=recompute)
    leaves = [layer.road_theta["default"], layer.road_alpha["default"]]
    leaves += [x] if x.requires_grad else []
    z = layer(x)
    upstream = torch.randn_like(z)
    got = torch.autograd.grad(z, leaves, upstream)
    wanted = torch.autograd.grad(base(x) @ _dense(layer).T, leaves, upstream)
    for name, ours, theirs in zip(("theta", "alpha", "x"), got, wanted, strict=False):
        assert_close(ours, theirs, f"gradient of {name}")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recompute_changes_no_output_and_no_gradient(dtype, recompute: bool) -> None:
    """The reference is the float64 gradient at the output that the layer keeps."""
    base, x = nn.Linear(6, 8, dtype=dtype), torch.randn(32, 6).to(dtype)
    plain = layer_of(copy.deepcopy(base))
    layer = layer_of(base, recompute=recompute)
    set_values(layer, plain.road_theta["default"], plain.road_alpha["default"])
    z = layer(x)
    assert torch.equal(z, plain(x))
    for one in (z, plain(x)):
        one.sum().backward()
    for name in ("road_theta", "road_alpha"):
        got, wanted = (getattr(m, name)["default"].grad for m in (layer, plain))
        assert got.dtype == torch.float32
        assert_close(got, wanted, name, dtype=dtype)


def test_gradcheck_of_a_layer_with_everything() -> None:
    layer = layer_of(
        nn.Linear(3, 7, dtype=torch.float64),
        variant="road_4",
        remainder="identity",
        group_size=2,
        lora_rank=2,
    )
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert len(parameters) == 4
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


# ---- stock PEFT -------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_stock_peft(variant: str, group: int) -> None:
    base = Mlp(outputs=8)
    x, upstream = torch.randn(16, 8), torch.randn(16, 8)
    results = {}
    for library in LIBRARIES:
        with registered(library) as config_class:
            model = peft.get_peft_model(
                copy.deepcopy(base),
                config_class(target_modules=["up", "down"], variant=variant, group_size=group),
            )
        torch.manual_seed(1)
        randomize(model)
        inputs = x.clone().requires_grad_()
        z = model(inputs)
        z.backward(upstream)  # not the norm of z, which no angle changes
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results[library] = {"z": z, "x": inputs.grad, **gradients}
    assert results["ours"].keys() == results["stock"].keys()
    assert len(results["ours"]) == 2 + 4
    for name, value in results["ours"].items():
        assert_close(value, results["stock"][name], name)


# ---- dtypes of parameters ---------------------------------------------------------------------

LOW = (torch.bfloat16, torch.float16)


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    return {p.dtype for n, p in model.named_parameters() if "road_" in n}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_float32_on_a_base_in_half_precision(dtype, rank: int) -> None:
    wanted = {torch.float64 if dtype == torch.float64 else torch.float32}
    config = RoadConfig(target_modules=["up", "down"], group_size=4, lora_rank=rank)
    model = peft.get_peft_model(Mlp().to(dtype), config)
    assert _dtypes(model) == wanted
    model.add_adapter("second", config)
    assert _dtypes(model) == wanted
    assert model(torch.randn(2, 8).to(dtype)).dtype == dtype
    injected = peft.inject_adapter_in_model(config, Mlp().to(dtype))
    assert _dtypes(injected) == wanted
    assert injected(torch.randn(2, 8).to(dtype)).dtype == dtype


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_declining_the_upcast_gives_parameters_in_the_dtype_of_the_base(dtype, rank: int) -> None:
    config = RoadConfig(target_modules=["up", "down"], group_size=4, lora_rank=rank)
    model = peft.get_peft_model(Mlp().to(dtype), config, autocast_adapter_dtype=False)
    assert _dtypes(model) == {dtype}
    model.add_adapter("second", config, autocast_adapter_dtype=False)
    assert _dtypes(model) == {dtype}
    randomize(model)
    x = torch.randn(2, 8).to(dtype)
    assert model(x).dtype == dtype
    (layer, _) = adapted(model)
    wanted = layer.base_layer(x).double() @ _dense(layer).T
    if not rank:
        assert_close(layer(x), wanted)


def test_stock_peft_has_half_precision_parameters_where_it_is_injected() -> None:
    """In bfloat16 a scale of 1 - 1e-3 is 1 again."""
    with registered("stock") as config_class:
        config = config_class(target_modules=["up"], group_size=4)
        model = peft.inject_adapter_in_model(config, Mlp().bfloat16())
    assert _dtypes(model) == {torch.bfloat16}


def test_a_small_update_in_a_bfloat16_model_is_not_lost() -> None:
    layer = layer_of(nn.Linear(4, 8).bfloat16())
    layer.reset_parameters("default")
    optimizer = torch.optim.SGD([layer.road_alpha["default"]], lr=1e-3)
    layer.road_alpha["default"].sum().backward()
    optimizer.step()
    assert_close(layer.road_alpha["default"], torch.full((4,), 0.999))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_layer_under_autocast_gives_the_dtype_of_its_base(rank: int) -> None:
    layer = layer_of(nn.Linear(6, 8), lora_rank=rank)
    x = torch.randn(4, 6)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    assert z.dtype == torch.bfloat16
    assert_close(z, wanted)


# ---- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_layer_computes_the_same_and_shares_nothing(copied) -> None:
    layer = layer_of(nn.Linear(6, 8), lora_rank=2)
    x = torch.randn(3, 6)
    wanted, twin = layer(x), copied(layer)
    assert torch.equal(twin(x), wanted)
    assert bytes_of(twin) == bytes_of(layer)
    randomize(twin)
    assert torch.equal(layer(x), wanted)


# ---- memory -----------------------------------------------------------------------------------


def _kept_per_row(model: nn.Module, dtype: torch.dtype) -> float:
    """Count the bytes that autograd keeps for each row, without the input and parameters."""

    def kept(rows: int) -> int:
        x = torch.randn(rows, 16).to(dtype).requires_grad_()
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        known.add(x.untyped_storage().data_ptr())
        seen: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z = model(x)
        assert z.requires_grad
        return sum(size for size, _ in seen.values())

    return (kept(64) - kept(32)) / 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_keeps_one_output_for_the_backward_where_stock_peft_keeps_more(
    variant: str, dtype
) -> None:
    kept = {}
    for library in LIBRARIES:
        with registered(library) as config_class:
            config = config_class(target_modules=["0"], group_size=16, variant=variant)
            model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 64)).to(dtype), config)
        kept[library] = _kept_per_row(model, dtype)
    one_output = 64 * dtype.itemsize
    assert kept["ours"] <= one_output
    assert kept["stock"] >= 2 * one_output


def test_recompute_keeps_nothing_that_the_next_operation_does_not_keep_anyway() -> None:
    """SiLU keeps its input, which is the output of the rotation."""
    kept = {}
    for recompute in (False, True):
        config = RoadConfig(target_modules=["0"], group_size=16, recompute=recompute)
        model = nn.Sequential(nn.Linear(16, 64), nn.SiLU())
        kept[recompute] = _kept_per_row(peft.get_peft_model(model, config), torch.float32)
    assert kept == {False: 2 * 64 * 4, True: 64 * 4}


def test_a_frozen_adapter_keeps_no_output() -> None:
    config = RoadConfig(target_modules=["0"], group_size=16)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 64)), config)
    model.requires_grad_(False)
    assert _kept_per_row(model, torch.float32) == 0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = randomize(peft.get_peft_model(tiny("llama"), RoadConfig(group_size=8))).train()
    tokens = torch.arange(12).view(2, 6)
    plain = torch.autograd.grad(_loss(model, tokens), _trainable(model))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(_loss(model, tokens), _trainable(model))
    for got, wanted in zip(again, plain, strict=True):
        assert_close(got, wanted)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ---- RoPE -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "commutes"), [(8, True), (2, False), (4, False)])
def test_rotating_heads_commutes_with_rope_only_where_the_pairs_are_those_of_rope(
    group: int, commutes: bool
) -> None:
    """Four heads of 8 features; RoPE pairs i with i + 4."""
    layer = layer_of(nn.Linear(6, 32, bias=False, dtype=torch.float64), group_size=group)
    angles = torch.outer(torch.arange(5.0), 10.0 ** -torch.arange(4.0)).double().repeat(1, 2)[None]

    def rope(h: Tensor) -> Tensor:
        heads = h.view(1, 5, 4, 8).transpose(1, 2)
        turned, _ = apply_rotary_pos_emb(heads, heads, angles.cos(), angles.sin())
        return turned.transpose(1, 2).reshape(1, 5, 32)

    x = torch.randn(1, 5, 6, dtype=torch.float64)
    rotation = _dense(layer)
    before, after = rope(layer(x)), rope(layer.base_layer(x)) @ rotation.T
    close = (before - after).abs().max() <= TOLERANCES[torch.float64] * math.sqrt(32)
    assert bool(close) == commutes
