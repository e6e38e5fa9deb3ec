"""Codes in words: golden words, round trips over shapes and widths, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels_peft.packing import FORMATS, RUN, pack, unpack, windows

# code k is k mod 2^bits, 32 codes of one column; by hand from the rule "bits [b k, b k + b)"
GOLDEN = {
    2: (0xE4E4E4E4, 0xE4E4E4E4),
    3: (0x88FAC688, 0xC688FAC6, 0xFAC688FA),
    4: (0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98),
}
CONSTANT = {
    (2, 2): (0xAAAAAAAA,) * 2,
    (3, 4): (0x24924924, 0x49249249, 0x92492492),
    (4, 8): (0x88888888,) * 4,
}


def words(tensor: Tensor) -> tuple[int, ...]:
    return tuple(int(value) & 0xFFFFFFFF for value in tensor.flatten())


def by_bits(codes: Tensor, bits: int) -> list[int]:
    """Pack one column bit by bit: an oracle without shifts across words."""
    stream = [int(code) >> bit & 1 for code in codes for bit in range(bits)]
    return [
        sum(bit << place for place, bit in enumerate(stream[start : start + 32]))
        for start in range(0, len(stream), 32)
    ]


@pytest.mark.parametrize("bits", FORMATS)
def test_golden_words(bits: int) -> None:
    codes = torch.arange(RUN) % FORMATS[bits].levels
    assert words(pack(codes, bits)) == GOLDEN[bits]
    assert words(pack(codes.view(RUN, 1), bits)) == GOLDEN[bits]


@pytest.mark.parametrize(("bits", "value"), CONSTANT)
def test_golden_words_of_constant_zero_points(bits: int, value: int) -> None:
    assert words(pack(torch.full((RUN,), value), bits)) == CONSTANT[bits, value]


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 4), st.integers(0, 5), st.integers(0, 99))
def test_codes_come_back(bits: int, runs: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(FORMATS[bits].levels, (runs * RUN, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (runs * bits, columns)
    assert torch.equal(unpack(packed, bits), codes)
    across = pack(codes.t(), bits, dim=1)
    assert torch.equal(across, packed.t())
    assert torch.equal(unpack(across, bits, dim=1), codes.t())
    for column in range(columns):
        assert list(words(packed[:, column])) == by_bits(codes[:, column], bits)


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("edge", ["lowest", "highest"])
def test_edge_codes_come_back(bits: int, edge: str) -> None:
    value = 0 if edge == "lowest" else FORMATS[bits].levels - 1  # the latter sets the sign bit
    codes = torch.full((RUN, 3), value, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 3), st.integers(0, 5), st.integers(0, 99))
def test_windows_hold_whole_codes_in_order(bits: int, runs: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    form = FORMATS[bits]
    codes = torch.randint(form.levels, (runs * RUN, columns), dtype=torch.int32)
    cut = windows(pack(codes, bits), bits)
    assert cut.shape == (runs * RUN // form.window, columns)
    assert bool((cut >= 0).all())
    assert bool((cut < 1 << 23).all())  # fits in the mantissa of a float32
    assert torch.equal(
        torch.stack([cut >> bits * i & form.levels - 1 for i in range(form.window)], 1).flatten(
            0, 1
        ),
        codes,
    )


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(31, 2, dtype=torch.int32), 2, "a multiple of 32 along dimension 0"),
        (torch.zeros(32, 2), 2, "they must be integers"),
        (torch.full((32,), 4), 2, "reach from 4 to 4; 2 bits hold 0 to 3"),
        (torch.full((32,), -1), 3, "reach from -1 to -1; 3 bits hold 0 to 7"),
        (torch.zeros(32, dtype=torch.int64), 5, "bits is 5; choose from 2, 3, 4"),
    ],
)
def test_what_cannot_be_packed_is_refused(codes: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(codes, bits)


@pytest.mark.parametrize(
    ("held", "bits", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int32), 3, "a multiple of 3 along dimension 0"),
        (torch.zeros(4, 2, dtype=torch.int64), 4, "they must be int32"),
        (torch.zeros(4, 2, dtype=torch.int32), 8, "bits is 8"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(held: Tensor, bits: int, message: str) -> None:
    for read in (unpack, windows):
        with pytest.raises(ValueError, match=message):
            read(held, bits)
