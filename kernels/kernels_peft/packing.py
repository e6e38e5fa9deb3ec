"""Low-bit codes in 32-bit words: the stream of GPTQ.

A bit width is one row of `FORMATS`; configuration, quantiser, kernels and tests read the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 32  # codes; a run of them fills whole words at every width


@dataclass(frozen=True)
class Format:
    """One width of code: the values it holds, and the words of a run of 32 codes.

    A window is a part of a run, `window` codes long; the widths are chosen so that a run is whole
    windows and a window fits in 23 bits, the mantissa of a float32.
    """

    bits: int
    window: int

    @property
    def levels(self) -> int:
        """How many values a code has."""
        return 1 << self.bits

    @property
    def words(self) -> int:
        """How many 32-bit words hold a run."""
        return self.bits


FORMATS = {form.bits: form for form in (Format(2, window=8), Format(3, 4), Format(4, 4))}


def pack(codes: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Pack codes along `dim` into one little-endian stream of bits, cut into words.

    Code k of a run of 32 takes the bits [b k, b k + b) of the stream; word w holds its bits
    [32 w, 32 w + 32).

    Shapes:
        codes: any integer dtype, `dim` a multiple of 32 long. Returns int32, `dim` shorter by
        bits / 32.
    Raises:
        ValueError: an unknown width, a length that fills no whole words, or a code out of range.
    Source:
        GPTQ's `qweight` (along inputs) and, without the offset of format 1, `qzeros` (outputs).
    """
    form = _form(bits)
    if codes.is_floating_point() or codes.shape[dim] % RUN:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)} and dtype {codes.dtype}; they must be integers,"
            f" and a multiple of {RUN} along dimension {dim}"
        )
    if codes.numel() and (codes.min() < 0 or codes.max() >= form.levels):
        raise ValueError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}; {bits} bits hold 0 to"
            f" {form.levels - 1}"
        )
    runs = codes.movedim(dim, 0).unflatten(0, (-1, RUN)).to(torch.int64)
    words = runs.new_zeros(runs.shape[0], form.words, *runs.shape[2:])
    for k in range(RUN):
        word, shift = divmod(bits * k, 32)
        words[:, word] |= runs[:, k] << shift
        if shift + bits > 32:
            words[:, word + 1] |= runs[:, k] >> (32 - shift)
    words &= 0xFFFFFFFF
    signed = torch.where(words > 0x7FFFFFFF, words - (1 << 32), words)
    return signed.to(torch.int32).flatten(0, 1).movedim(0, dim).contiguous()


def unpack(words: Tensor, bits: int, dim: int = 0) -> Tensor:
    """Give the codes that `pack` packed.

    Shapes:
        words: int32, `dim` a multiple of `bits` long. Returns uint8, `dim` longer by 32 / bits.
    Raises:
        ValueError: an unknown width, or words of a wrong dtype or number.
    """
    form = _form(bits)
    _check_words(words, form, dim)
    runs = words.movedim(dim, 0).unflatten(0, (-1, form.words))
    codes = torch.empty(runs.shape[0], RUN, *runs.shape[2:], dtype=torch.uint8, device=words.device)
    for k in range(RUN):
        codes[:, k] = _field(runs, bits * k, bits)
    return codes.flatten(0, 1).movedim(0, dim).contiguous()


def windows(words: Tensor, bits: int) -> Tensor:
    """Cut a stream along the first dimension into windows of whole codes, one to a word.

    Shapes:
        words: (n, ...), int32, n a multiple of `bits`. Returns (m, ...), int32: windows in their
        order, their first code in the lowest bits and zeros above their last.
    Raises:
        ValueError: an unknown width, or words of a wrong dtype or number.
    """
    form = _form(bits)
    _check_words(words, form, 0)
    runs = words.unflatten(0, (-1, form.words))
    width = bits * form.window
    cut = words.new_empty(runs.shape[0], RUN // form.window, *words.shape[1:])
    for i in range(cut.shape[1]):
        cut[:, i] = _field(runs, width * i, width)
    return cut.flatten(0, 1)


def _field(runs: Tensor, start: int, width: int) -> Tensor:
    """Give `width` bits of every run, from bit `start` on."""
    word, shift = divmod(start, 32)
    value = runs[:, word] >> shift
    if shift + width > 32:  # an arithmetic shift brings copies of the sign, so mask them first
        low = 32 - shift
        value = (value & ((1 << low) - 1)) | (runs[:, word + 1] << low)
    return value & ((1 << width) - 1)


def _check_words(words: Tensor, form: Format, dim: int) -> None:
    if words.dtype != torch.int32 or words.shape[dim] % form.words:
        raise ValueError(
            f"words have shape {tuple(words.shape)} and dtype {words.dtype}; they must be int32,"
            f" and a multiple of {form.words} along dimension {dim} for {form.bits} bits"
        )


def _form(bits: int) -> Format:
    if bits not in FORMATS:
        raise ValueError(f"bits is {bits}; choose from {', '.join(map(str, FORMATS))}")
    return FORMATS[bits]
