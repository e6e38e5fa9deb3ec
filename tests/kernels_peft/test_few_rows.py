"""Few rows on a CPU: codes along the outputs give the product of the reference."""

from __future__ import annotations

import pytest
import torch

from kernels_peft.packed_linear import packed_linear_reference
from kernels_peft.packed_linear.few_rows import MOST_ROWS, along_outputs, few_rows_product
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
    ("rows", "K", "N", "group"), [(1, 64, 32, 32), (3, 192, 96, 64), (MOST_ROWS, 128, 64, 128)]
)
def test_the_product_is_the_references(bits: int, rows: int, K: int, N: int, group: int) -> None:
    torch.manual_seed(0)
    weight = packed(bits, K, N, group)
    x = torch.randn(rows, K)
    wanted = packed_linear_reference(x.double(), *weight[:3], None, bits)
    found = few_rows_product(x, along_outputs(*weight))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max())
    narrow = few_rows_product(x.bfloat16(), along_outputs(*weight))
    exact = packed_linear_reference(x.bfloat16().double(), *weight[:3], None, bits)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=2e-6 * exact.abs().max())


@pytest.mark.parametrize(("bits", "field"), [(2, 2), (3, 4), (4, 4)])
def test_codes_keep_to_their_fields(bits: int, field: int) -> None:
    along = along_outputs(*packed(bits, 64, 32, 32))
    assert along.table.shape == (64, 32 * field // 8 + 4)


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(1)
    weight = along_outputs(*packed(2, 128, 64, 64))
    x = torch.randn(5, 128)
    together = few_rows_product(x, weight)
    assert all(
        torch.equal(few_rows_product(row[None], weight)[0], together[i]) for i, row in enumerate(x)
    )
