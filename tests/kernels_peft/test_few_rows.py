"""Few rows on a CPU: copies of the codes in another order give the product of the reference."""

from __future__ import annotations

import pytest
import torch

from kernels_peft.packed_linear import packed_linear_reference
from kernels_peft.packed_linear.few_rows import AlongOutputs, Words, copy_for
from kernels_peft.packed_linear.reference import dequantize_reference
from kernels_peft.packing import FORMATS, pack


def packed(
    bits: int, K: int, N: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    highest = FORMATS[bits].levels
    codes = torch.randint(0, highest, (K, N), dtype=torch.uint8)
    zeros = torch.randint(0, highest, (K // group, N), dtype=torch.uint8)
    scales = (torch.rand(K // group, N) * 0.02 + 0.001).half()
    return pack(codes, bits), pack(zeros, bits, dim=1), scales, bits


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize(
    ("rows", "K", "N", "group"),
    [(1, 64, 32, 32), (3, 192, 96, 64), (AlongOutputs.most_rows, 128, 64, 128)],
)
def test_the_product_is_the_references(bits: int, rows: int, K: int, N: int, group: int) -> None:
    torch.manual_seed(0)
    weight = packed(bits, K, N, group)
    x = torch.randn(rows, K)
    wanted = packed_linear_reference(x.double(), *weight[:3], None, bits)
    found = AlongOutputs.of(*weight).product(x)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max())
    narrow = AlongOutputs.of(*weight).product(x.bfloat16())
    exact = packed_linear_reference(x.bfloat16().double(), *weight[:3], None, bits)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=2e-6 * exact.abs().max())


@pytest.mark.parametrize(("bits", "field"), [(2, 2), (3, 4), (4, 4)])
def test_codes_keep_to_their_fields(bits: int, field: int) -> None:
    along = AlongOutputs.of(*packed(bits, 64, 32, 32))
    assert along.table.shape == (64, 32 * field // 8 + 4)


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(1)
    weight = AlongOutputs.of(*packed(2, 128, 64, 64))
    x = torch.randn(5, 128)
    together = weight.product(x)
    assert all(torch.equal(weight.product(row[None])[0], together[i]) for i, row in enumerate(x))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(
    ("rows", "K", "N", "group"),
    [(1, 64, 32, 32), (3, 192, 96, 64), (Words.most_rows, 128, 160, 128), (2, 512, 64, 256)],
)
def test_words_are_as_exact_as_a_weight_in_bfloat16(
    bits: int, rows: int, K: int, N: int, group: int
) -> None:
    torch.manual_seed(2)
    weight = packed(bits, K, N, group)
    x = torch.randn(rows, K).bfloat16()
    exact = packed_linear_reference(x.double(), *weight[:3], None, bits)
    dense = dequantize_reference(*weight[:3], bits, torch.bfloat16)
    found, rounded = Words.of(*weight).product(x), x @ dense
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 2 * (rounded - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", FORMATS)
def test_rows_may_lie_apart(bits: int, dtype: torch.dtype) -> None:
    weight = packed(bits, 64, 32, 32)
    x = torch.randn(2, 3, 64).to(dtype)[:, -1]
    held = copy_for(bits, 32, dtype).of(*weight)
    assert torch.equal(held.product(x), held.product(x.contiguous()))


def test_the_copy_is_chosen_by_width_group_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert copy_for(4, 64, torch.bfloat16) is copy_for(3, 32, torch.bfloat16) is Words
    for other in ((2, 64, torch.bfloat16), (4, 192, torch.bfloat16), (4, 64, torch.float32)):
        assert copy_for(*other) is AlongOutputs
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert copy_for(4, 64, torch.bfloat16) is AlongOutputs
