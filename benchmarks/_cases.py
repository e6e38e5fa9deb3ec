"""What is measured: the layer sizes of real models and, for each command, a table of cases.

A size is a name on the command line: `tiny` is for tests, `quick` takes about a minute on two
cores, `full` is for a CPU, `gpu` for a CUDA device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SIZES = ("tiny", "quick", "full", "gpu")
GROUP_SIZE = 64
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BOTH = (FP32, BF16)

# Largest relative error (Frobenius norm) against float64 with which a provider is still timed.
TOLERANCE = {torch.float64: 1e-10, FP32: 1e-4, BF16: 5e-2, FP16: 1e-2}


@dataclass(frozen=True)
class Shape:
    """The sizes of one Llama-shaped block."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int

    def linear(self, layer: str) -> tuple[int, int]:
        """Give (in_features, out_features) of the layer called `layer`_proj."""
        head = self.hidden // self.heads
        return {
            "q": (self.hidden, self.hidden),
            "k": (self.hidden, head * self.key_value_heads),
            "v": (self.hidden, head * self.key_value_heads),
            "o": (self.hidden, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }[layer]


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")

SHAPES = {
    "tiny": Shape(128, 256, 2, 1),
    "hidden-1024": Shape(1024, 2816, 16, 4),
    "SmolLM2-135M": Shape(576, 1536, 9, 3),
    "Llama-3.2-1B": Shape(2048, 8192, 32, 8),
    "Llama-3.2-3B": Shape(3072, 8192, 24, 8),
    "Llama-2-7B": Shape(4096, 11008, 32, 32),
    "Llama-3-8B": Shape(4096, 14336, 32, 8),
    "Qwen2.5-7B": Shape(3584, 18944, 28, 4),
}


def dtype_name(dtype: torch.dtype) -> str:
    """Give "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LinearCase:
    """One linear layer of a model, trained on several numbers of tokens."""

    shape: str
    layer: str
    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = BOTH


@dataclass(frozen=True)
class StackCase:
    """Transformer blocks with all seven linears adapted."""

    shape: str
    blocks: int
    batch: int
    lengths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = BOTH


@dataclass(frozen=True)
class MergeCase:
    """The weight of one layer of a model, merged and unmerged, also by PEFT if `dense`."""

    shape: str
    layer: str
    dtypes: tuple[torch.dtype, ...] = BOTH
    dense: bool = True


@dataclass(frozen=True)
class RotationCase:
    """The rotation operator on (tokens, features)."""

    features: int
    tokens: tuple[int, ...]
    group_sizes: tuple[int, ...] = (GROUP_SIZE,)
    dtypes: tuple[torch.dtype, ...] = BOTH
    compiled: bool = True


@dataclass(frozen=True)
class BankCase:
    """The rotation by slot on (rows, features), the slots drawn uniformly from `slots`."""

    features: int
    rows: tuple[int, ...]
    slots: int = 32
    dtypes: tuple[torch.dtype, ...] = BOTH
    compiled: bool = True


@dataclass(frozen=True)
class ServeCase:
    """A language model that serves every row of a batch with an adapter of its own choice.

    A panel whose sizes are left out is not measured. `context` is the number of tokens in the
    cache at a decode step, `batch` the number of rows where nothing else is said.
    """

    shape: str
    blocks: int
    batches: tuple[int, ...]  # each row with an adapter of its own
    ranks: tuple[int, ...] = ()  # of LoRA, with a single row
    generated: tuple[int, ...] = ()  # tokens of each row
    prompts: tuple[int, ...] = ()  # tokens of each row
    workload_rows: int = 0  # as many adapters to choose from
    context: int = 64
    batch: int = 8
    dtypes: tuple[torch.dtype, ...] = BOTH

    @property
    def adapters(self) -> int:
        """The largest number of different adapters in a batch, at least two."""
        return max(2, self.batch, self.workload_rows, *self.batches)


@dataclass(frozen=True)
class KernelCase:
    """A product with the weight of one layer of a model, packed and not, on several rows.

    At the numbers of rows in `steps` a forward with its backward is measured too.
    """

    shape: str
    layer: str
    rows: tuple[int, ...]
    steps: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = BOTH


@dataclass(frozen=True)
class GridCase:
    """The weight of one layer of a model, rounded to a grid and back as calibration does."""

    shape: str
    layer: str
    dtypes: tuple[torch.dtype, ...] = BOTH


TRAIN: dict[str, tuple[LinearCase | StackCase, ...]] = {
    "tiny": (LinearCase("tiny", "up", (4, 8)), StackCase("tiny", 1, 2, (4,))),
    "quick": (
        LinearCase("Llama-3.2-1B", "q", (128, 512), (FP32,)),
        LinearCase("SmolLM2-135M", "q", (128,), (BF16,)),
        StackCase("SmolLM2-135M", 2, 2, (64,), (FP32,)),
    ),
    "full": (
        LinearCase("SmolLM2-135M", "down", (32, 128, 512, 2048), (FP32,)),
        LinearCase("SmolLM2-135M", "down", (32, 128), (BF16,)),
        LinearCase("Llama-3.2-1B", "q", (32, 128, 512, 2048), (FP32,)),
        LinearCase("Llama-3.2-1B", "up", (512,), (FP32,)),
        LinearCase("Llama-2-7B", "q", (512,), (FP32,)),
        StackCase("SmolLM2-135M", 4, 2, (64, 256), (FP32,)),
        StackCase("hidden-1024", 2, 2, (64, 256), (FP32,)),
    ),
    "gpu": (
        LinearCase("Llama-3.2-1B", "q", (512, 2048, 8192)),
        LinearCase("Llama-3.2-3B", "up", (512, 2048, 8192)),
        LinearCase("Llama-2-7B", "q", (512, 2048, 8192)),
        LinearCase("Llama-2-7B", "up", (512, 2048, 8192)),
        StackCase("SmolLM2-135M", 4, 4, (512, 2048)),
        StackCase("Llama-3.2-1B", 4, 4, (512, 2048)),
        StackCase("Llama-2-7B", 2, 2, (512, 2048), (BF16,)),
    ),
}

MERGE: dict[str, tuple[MergeCase, ...]] = {
    "tiny": (MergeCase("tiny", "up"),),
    "quick": (
        MergeCase("hidden-1024", "q"),
        MergeCase("Llama-3.2-1B", "q", (FP32,)),
    ),
    "full": (
        MergeCase("Llama-2-7B", "q", (FP32,)),
        MergeCase("Llama-2-7B", "up", (FP32,)),
        MergeCase("Llama-3.2-1B", "q", (BF16,)),
        # dense products in bfloat16 take PEFT's RoAd many minutes to hours on a CPU
        MergeCase("Llama-2-7B", "q", (BF16,), dense=False),
        MergeCase("Llama-2-7B", "up", (BF16,), dense=False),
    ),
    "gpu": (
        MergeCase("Llama-3.2-1B", "up"),
        MergeCase("Llama-2-7B", "q"),
        MergeCase("Llama-2-7B", "up"),
    ),
}

ROTATION: dict[str, tuple[RotationCase, ...]] = {
    "tiny": (RotationCase(128, (3, 8), (2, 64), compiled=False),),
    "quick": (RotationCase(2048, (1, 32, 1024), compiled=False),),
    "full": (
        RotationCase(576, (1, 32, 512, 4096), compiled=False),
        RotationCase(2048, (1, 8, 32, 512, 4096)),
        RotationCase(2048, (1, 32, 512), (2, 2048), compiled=False),
        RotationCase(11008, (1, 32, 512), compiled=False),
    ),
    "gpu": (
        RotationCase(2048, (1, 32, 512, 4096, 16384), (2, 64, 2048)),
        RotationCase(4096, (1, 32, 512, 4096, 16384)),
        RotationCase(11008, (1, 32, 512, 4096, 16384)),
    ),
}

BANK: dict[str, tuple[BankCase, ...]] = {
    "tiny": (BankCase(128, (3, 8), 4, compiled=False),),
    "quick": (BankCase(1024, (8, 32, 512), compiled=False),),
    "full": (
        BankCase(1024, (1, 8, 32, 64, 512, 4096)),
        BankCase(2816, (8, 32, 512), compiled=False),
        BankCase(4096, (8, 32, 512), compiled=False),
    ),
    "gpu": (
        BankCase(2048, (1, 64, 1024, 8192)),
        BankCase(4096, (1, 64, 1024, 8192), 64),
        BankCase(11008, (64, 8192)),
    ),
}

SERVE: dict[str, tuple[ServeCase, ...]] = {
    "tiny": (ServeCase("tiny", 1, (1, 4), (1, 2), (2,), (4,), 4, context=4, batch=2),),
    "quick": (ServeCase("hidden-1024", 2, (1, 8, 32), (1, 16), (8,), (16,), 16),),
    "full": (
        ServeCase(
            "hidden-1024",
            8,
            (1, 2, 4, 8, 16, 32, 64),
            (1, 2, 4, 8, 16),
            (16, 32, 64),
            (32, 128),
            32,
        ),
        ServeCase("Llama-3.2-1B", 4, (8, 32)),
    ),
    "gpu": (
        ServeCase(
            "Llama-3.2-1B",
            16,
            (1, 2, 4, 8, 16, 32, 64),
            (1, 2, 4, 8, 16),
            (256,),
            (128, 512),
            64,
            context=512,
            dtypes=(BF16,),
        ),
        ServeCase(
            "Llama-2-7B",
            32,
            (1, 2, 4, 8, 16, 32, 64),
            (1, 2, 4, 8, 16),
            (256, 1024, 2048, 4096),
            (128, 512),
            64,
            context=512,
            dtypes=(BF16,),
        ),
    ),
}

_EVERY_SIZE = tuple(2**n for n in range(13))  # 1 to 4096

KERNELS: dict[str, tuple[KernelCase | GridCase, ...]] = {
    "tiny": (KernelCase("tiny", "up", (1, 8), (8,)), GridCase("tiny", "up", (FP32,))),
    "quick": (
        KernelCase("Llama-3.2-1B", "q", (1, 16, 256), (256,)),
        GridCase("Llama-3.2-1B", "q", (FP32,)),
    ),
    "full": (
        KernelCase("Llama-2-7B", "q", (1, 4, 16, 64, 256, 1024, 4096), (256, 1024)),
        KernelCase("Llama-2-7B", "up", (1, 16, 256)),
        KernelCase("Llama-3-8B", "k", (1, 16, 256)),
        KernelCase("Llama-3-8B", "down", (1, 16)),
        KernelCase("Qwen2.5-7B", "up", (1, 16)),
        GridCase("Llama-2-7B", "q", (FP32,)),
    ),
    "gpu": (
        KernelCase("Llama-2-7B", "q", _EVERY_SIZE, (16, 256, 4096), (BF16, FP16)),
        KernelCase("Llama-2-7B", "up", _EVERY_SIZE, (256, 4096), (BF16, FP16)),
        KernelCase("Llama-2-7B", "down", _EVERY_SIZE, (), (FP16,)),
        KernelCase("Llama-3-8B", "k", _EVERY_SIZE, (), (FP16,)),
        KernelCase("Llama-3-8B", "down", _EVERY_SIZE, (), (FP16,)),
        KernelCase("Qwen2.5-7B", "up", _EVERY_SIZE, (), (FP16,)),
        GridCase("Llama-2-7B", "up"),
    ),
}
