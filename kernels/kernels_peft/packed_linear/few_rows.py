"""The product of few rows on a CPU, without writing the weight out: sums of codes by torch's bags.

torch has sums of rows of 2- and 4-bit codes, weighted, for the embeddings of recommenders. They
serve here with codes that are packed along the outputs: a bag is a group of inputs, its weights the
values of one row of x, and scales and zero points come in for each group afterwards,

    y[m, n] = sum over groups j of s[j, n] (sum over k in j of x[m, k] q[k, n] - z[j, n] X[m, j])

with X[m, j] the sum of x[m, k] over the group. Codes of 3 bits lie in fields of 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels_peft.packed_linear.reference import packed_sizes
from kernels_peft.packing import RUN, unpack

# With more rows the blocks of `blocked.py` are faster: they write each block out once for all.
MOST_ROWS = 8
_INPUTS = 256  # whose codes are unpacked at a time, a multiple of RUN
_FIELDS = {2: 2, 3: 4, 4: 4}
_SUMS: dict[int, Any] = {
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
    4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
}


class AlongOutputs(NamedTuple):
    """A packed weight as the sums take it.

    Shapes:
        table: (K, N field / 8 + 4), uint8: codes, then the 1 and the 0 in float16 that each is
        multiplied with and that is added. zeros: (G, N), uint8. scales: (G, N), float32.
    """

    field: int  # bits
    table: Tensor
    zeros: Tensor
    scales: Tensor


def along_outputs(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int) -> AlongOutputs:
    """Pack the codes of a weight along its outputs, a copy of them.

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
    return AlongOutputs(field, table, unpack(qzeros, bits, dim=1), scales.float())


def few_rows_product(x: Tensor, weight: AlongOutputs) -> Tensor:
    """Give x W^T; sums are in float32 and are rounded once.

    Shapes:
        x: (M, K). Returns (M, N), the dtype of x.
    """
    M, K = x.shape
    groups = len(weight.scales)
    bags = x.float().view(M, groups, -1).transpose(0, 1)  # (G, M, g)
    inputs = torch.arange(K, dtype=torch.int32).view(groups, 1, -1).expand_as(bags)
    starts = torch.arange(0, M * K + 1, K // groups, dtype=torch.int32)
    sums = _SUMS[weight.field](
        weight.table, inputs.reshape(-1), starts, False, 0, False, bags.reshape(-1), None, True
    ).view(groups, M, -1)
    sums.addcmul_(bags.sum(-1, keepdim=True), weight.zeros.float().unsqueeze(1), value=-1)
    return sums.mul_(weight.scales.unsqueeze(1)).sum(0).to(x.dtype)
