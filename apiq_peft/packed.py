"""The quantised layer of a base model: packed codes in the place of a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apiq_peft.quantizer import SCALE_DTYPE, Codes, check
from kernels_peft.autocast import in_autocast_dtype
from kernels_peft.outputs import in_shape
from kernels_peft.packed_linear import check_packed, dequantize, packed_linear
from kernels_peft.packed_linear.few_rows import AlongOutputs, Copy, Words, copy_for
from kernels_peft.packing import RUN, pack, unpack


class PackedLinear(nn.Module):
    """A linear layer whose frozen weight is 2-, 3- or 4-bit codes.

    The tensors are those of GPTQ's format 2, without `g_idx`: groups lie in order. Codes and zero
    points are frozen parameters, which FSDP2 shards and DDP does not send; scales are a buffer, so
    that no policy of mixed precision rounds them. No copy of the weight in floating point is kept;
    the backward dequantises it again. On a CPU a layer that has
    met few rows without a gradient keeps its codes a second time, in an order in which these rows
    are multiplied several times faster; `train()` drops them.

    `conv1d` says that the layer was transformers' Conv1D, and `reproducible` that it was packed
    without data, so that packing the same weight again gives the same codes.

    Shapes:
        qweight: (K bits / 32, N), int32. qzeros: (K / g, N bits / 32), int32. scales: (K / g, N),
        float16. bias: (N,).
    """

    qweight: nn.Parameter
    qzeros: nn.Parameter
    scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        """Make a layer without values, for a checkpoint to fill; `group_size` -1 is a whole row.

        Raises:
            ValueError: sizes that cannot be packed.
        """
        super().__init__()
        self._copied: tuple[list[object], AlongOutputs | Words] | None = None
        check(bits, group_size, "asymmetric", in_features)
        if in_features % RUN or out_features % RUN:
            raise ValueError(
                f"a layer of {in_features} inputs and {out_features} outputs cannot be packed; both"
                f" must be multiples of {RUN}. Leave it out of target_modules"
            )
        groups = 1 if group_size == -1 else in_features // group_size
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size, self.dtype = in_features // groups, dtype
        self.conv1d, self.reproducible = conv1d, False
        words = {
            "qweight": (in_features * bits // RUN, out_features),
            "qzeros": (groups, out_features * bits // RUN),
        }
        for name, shape in words.items():
            setattr(self, name, _frozen(torch.zeros(shape, dtype=torch.int32, device=device)))
        scales = torch.zeros(groups, out_features, dtype=SCALE_DTYPE, device=device)
        self.register_buffer("scales", scales)
        zeros = torch.zeros(out_features, dtype=dtype, device=device)
        self.bias = _frozen(zeros) if bias else None

    @classmethod
    def from_codes(
        cls,
        codes: Codes,
        bits: int,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
        conv1d: bool = False,
    ) -> PackedLinear:
        """Pack a quantised weight; `dtype` is that of the model."""
        (N, K), groups = codes.codes.shape, codes.scales.shape[1]
        layer = cls(K, N, bits, K // groups, bias is not None, dtype, "meta", conv1d)
        layer.qweight = _frozen(pack(codes.codes.t(), bits))
        layer.qzeros = _frozen(pack(codes.zeros.t(), bits, dim=1))
        layer.scales = codes.scales.t().contiguous()
        if bias is not None:
            layer.bias = _frozen(bias.detach().clone())
        return layer

    def codes(self) -> Codes:
        """Unpack."""
        codes, zeros = unpack(self.qweight, self.bits), unpack(self.qzeros, self.bits, dim=1)
        return Codes(codes.t().contiguous(), self.scales.t().contiguous(), zeros.t().contiguous())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the weight (N, K) in `dtype`, a new tensor."""
        return dequantize(self.qweight, self.qzeros, self.scales, self.bits, dtype).t()

    def check(self) -> None:
        """Refuse tensors that a broken file may have brought.

        Raises:
            ValueError: shapes or dtypes that do not fit, or scales that are not finite.
        """
        check_packed(self.qweight, self.qzeros, self.scales, self.bits)
        if not torch.isfinite(self.scales).all():
            raise ValueError("scales has values that are not finite; the file is broken")

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def product(
        self,
        x: Tensor,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        scale: float = 1.0,
        lora_x: Tensor | None = None,
    ) -> Tensor:
        """Give x Q^T + bias, plus scale (x A^T) B^T if there is a LoRA; `lora_x` is its own x.

        The result has the dtype of x, or that of autocast, to which both x are cast then.

        Shapes:
            x, lora_x: (..., K). lora_a: (r, K). lora_b: (N, r). Returns (..., N).
        """
        x, lora_x = in_autocast_dtype(x, lora_x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        kind = self._few_rows(x, lora_a, lora_b, lora_x)
        if kind is not None:
            rows = x.reshape(-1, self.in_features)
            y = self._copy(kind).product(rows)
            if bias is not None:
                y += bias
            if lora_a is not None and lora_b is not None:
                branch = rows if lora_x is None else lora_x.reshape(rows.shape)
                y.addmm_(F.linear(branch, lora_a.to(x.dtype)), lora_b.to(x.dtype).t(), alpha=scale)
            return in_shape(y, (*x.shape[:-1], self.out_features))
        packed = (self.qweight, self.qzeros, self.scales, bias, self.bits)
        return packed_linear(x, *packed, lora_a, lora_b, scale, lora_x)

    def _few_rows(self, x: Tensor, *others: Tensor | None) -> Copy | None:
        """Give the copy of the codes that serves: few rows on a CPU, and nothing to learn."""
        if x.device.type != "cpu" or self.training or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
            return None
        if x.dtype == torch.float64:
            return None
        kind = copy_for(self.bits, self.group_size, x.dtype)
        return kind if 0 < x.numel() <= kind.most_rows * self.in_features else None

    def _copy(self, kind: Copy) -> AlongOutputs | Words:
        """Give the codes in the other order, made anew if they were not there or have changed."""
        held = (self.qweight, self.qzeros, self.scales)
        # an inference tensor has no version, and cannot be written to outside of inference either
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in held]
        now: list[object] = [kind, *versions]
        if self._copied is None or self._copied[0] != now:
            with torch.inference_mode(False):
                self._copied = (now, kind.of(*held, self.bits))
        return self._copied[1]

    def train(self, mode: bool = True) -> PackedLinear:
        """Set the mode; in training the second copy of the codes is dropped."""
        if mode:
            self._copied = None
        return super().train(mode)

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) in the dtype of the model, written out anew each time; frozen."""
        return self.dequantize(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # `model.half()` and the like set the dtype of the model; scales keep theirs, and all bits
        scales = self.scales
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, of codes, zero points and scales, for each weight."""
        held = sum(t.nbytes for t in (self.qweight, self.qzeros, self.scales))
        return 8 * held / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits},"
            f" group_size={self.group_size}, bias={self.bias is not None}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
