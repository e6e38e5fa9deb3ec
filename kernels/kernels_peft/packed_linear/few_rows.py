"""The product of few rows on a CPU, without writing the weight out: torch's own sums of codes.

Both ways keep the codes a second time, in an order of their own. `copy_for` chooses.

Bags: torch has sums of rows of 2- and 4-bit codes, weighted, for the embeddings of recommenders.
They serve here with codes that are packed along the outputs: a bag is a group of inputs, its
weights the values of one row of x, and scales and zero points come in for each group afterwards,

    y[m, n] = sum over groups j of s[j, n] (sum over k in j of x[m, k] q[k, n] - z[j, n] X[m, j])

with X[m, j] the sum of x[m, k] over the group. Codes of 3 bits lie in fields of 4.

Words: torch's product of bfloat16 with 4-bit codes, whose weight is (q - 8) s + (8 - z) s with both
terms of the grid in bfloat16, and so as far from the exact one as a weight rounded to bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.packing import RUN, unpack

_INPUTS = 256  # whose codes are unpacked at a time, a multiple of RUN
_FIELDS = {2: 2, 3: 4, 4: 4}
_SUMS: dict[int, Any] = {
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
}
_WORD_BITS = 4  # of a code
_WORD_GROUPS = (32, 64, 128, 256)  # that torch's product takes


@dataclass(frozen=True)
class AlongOutputs:
    """A packed weight as the bags take it.

    Shapes:
        table: (K, N field / 8 + 4), uint8: codes, then the 1 and the 0 in float16 that each is
        multiplied with and that is added. zeros: (G, N), uint8. scales: (G, N), float32.
    """

    # With more rows the blocks of `blocked.py` are faster: they write each block out once for all.
    most_rows: ClassVar[int] = 8

    field: int  # bits
    table: Tensor
    zeros: Tensor
    scales: Tensor

    @classmethod
    def of(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> AlongOutputs:
        """Pack the codes of a weight along its outputs.

        Shapes:
            qweight: (K bits / 32, N). qzeros: (G, N bits / 32). scales: (G, N).
        """
        field = _FIELDS[bits]
        (K, N), each = packed_sizes(qweight, bits), 8 // field  # codes of a byte
        table = torch.empty(K, N // each + 4, dtype=torch.uint8)
        table[:, N // each :] = torch.tensor([1.0, 0.0], dtype=torch.float16).view(torch.uint8)
        for start in range(0, K, _INPUTS):
            words = qweight[start * bits // RUN : (start + _INPUTS) * bits // RUN]
            codes = unpack(words, bits).unflatten(1, (-1, each))
            packed = codes[..., 0].clone()
            for place in range(1, each):
                packed |= codes[..., place] << (field * place)
            table[start : start + _INPUTS, : N // each] = packed
        return cls(field, table, unpack(qzeros, bits, dim=1), scales.float())

    def product(self, x: Tensor) -> Tensor:
        """Give x W^T; sums are in float32 and are rounded once.

        Shapes:
            x: (M, K). Returns (M, N), the dtype of x.
        """
        M, K = x.shape
        groups = len(self.scales)
        bags = x.float().view(M, groups, -1).transpose(0, 1)  # (G, M, g)
        inputs = torch.arange(K, dtype=torch.int32).view(groups, 1, -1).expand_as(bags)
        starts = torch.arange(0, M * K + 1, K // groups, dtype=torch.int32)
        sums = _SUMS[self.field](
            self.table, inputs.reshape(-1), starts, False, 0, False, bags.reshape(-1), None, True
        ).view(groups, M, -1)
        sums.addcmul_(bags.sum(-1, keepdim=True), self.zeros.float().unsqueeze(1), value=-1)
        return sums.mul_(self.scales.unsqueeze(1)).sum(0).to(x.dtype)


@dataclass(frozen=True)
class Words:
    """A packed weight as torch's product of bfloat16 and 4-bit codes takes it.

    Shapes:
        words: (N, K / 2), uint8, in an order of torch's own. grid: (G, N, 2), bfloat16: s, and
        (8 - z) s.
    """

    most_rows: ClassVar[int] = 64

    words: Tensor
    grid: Tensor

    @classmethod
    def of(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> Words:
        """Lay out the codes of a weight; shapes as for `AlongOutputs.of`."""
        codes = unpack(qweight, bits).t().to(torch.int32)
        words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
        wide, middle = scales.float(), 2 ** (_WORD_BITS - 1)
        shift = (middle - unpack(qzeros, bits, dim=1).float()) * wide
        return cls(words, torch.stack((wide, shift), -1).bfloat16())

    def product(self, x: Tensor) -> Tensor:
        """Give x W^T.

        Shapes:
            x: (M, K), bfloat16. Returns (M, N), bfloat16.
        """
        group_size = x.shape[1] // len(self.grid)
        rows = x.contiguous()  # torch's product takes no other
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.words, group_size, self.grid)


Copy: TypeAlias = "type[AlongOutputs] | type[Words]"


def copy_for(bits: int, group_size: int, dtype: torch.dtype) -> Copy:
    """Choose the faster way for inputs of a dtype. Its `most_rows` is how many it is for.

    Codes of 2 bits take half as much memory along the outputs, so they stay there.
    """
    words = (
        dtype == torch.bfloat16
        and _FIELDS[bits] == _WORD_BITS
        and group_size in _WORD_GROUPS
        # without these instructions torch multiplies element by element
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    )
    return Words if words else AlongOutputs
