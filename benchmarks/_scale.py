"""Memory and bytes on the wire of a training step on several devices, by formulas.

Every figure follows from the shapes of a Llama-like model. What the formulas say of collectives is
compared with those that small runs on two processes really call (`tests/benchmarks/test_scale.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HALF, FULL = 2, 4  # bytes of bfloat16 and float32
ADAM = 2 * FULL  # two moments
SCALE = 16  # bits


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model with an untied head; `kv` is the width of all key heads."""

    name: str
    hidden: int
    kv: int
    intermediate: int
    blocks: int
    vocabulary: int

    def linears(self) -> list[tuple[str, int, int]]:
        """Give (name, in, out) of the linear layers of a block."""
        h, kv, f = self.hidden, self.kv, self.intermediate
        return [
            *(("q", h, h), ("k", h, kv), ("v", h, kv), ("o", h, h)),
            *(("gate", h, f), ("up", h, f), ("down", f, h)),
        ]

    @property
    def block_linears(self) -> int:
        """The weights of the linear layers of a block."""
        return sum(i * o for _, i, o in self.linears())

    @property
    def root(self) -> int:
        """The weights outside the blocks."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def weights(self) -> int:
        """All weights."""
        return self.blocks * (self.block_linears + 2 * self.hidden) + self.root


# The sizes of Llama 3.1.
SHAPES = (
    Shape("8B", 4096, 1024, 14336, 32, 128256),
    Shape("70B", 8192, 1024, 28672, 80, 128256),
    Shape("405B", 16384, 1024, 53248, 126, 128256),
)
ROW_PARALLEL = ("o", "down")  # tensor parallelism splits these by inputs, the others by outputs


@dataclass(frozen=True)
class Method:
    """What is trained, and in how many bits the frozen linear layers of the blocks are stored.

    `whole_bits` of them are scales, a buffer that every device holds whole. `rank` is that of a
    LoRA, `per_pair` the angles (and the scales) of a RoAd for two outputs; with neither, every
    weight is trained.
    """

    name: str
    rank: int = 0
    per_pair: int = 0
    bits: float = 16
    whole_bits: float = 0

    @property
    def full(self) -> bool:
        return not self.rank and not self.per_pair

    @property
    def packed(self) -> bool:
        return self.bits < 16

    def trained_of(self, inputs: int, outputs: int) -> int:
        """Give the trained parameters of one linear layer."""
        if self.full:
            return inputs * outputs
        return self.rank * (inputs + outputs) + outputs * self.per_pair

    def trained(self, shape: Shape) -> int:
        """Give all trained parameters."""
        if self.full:
            return shape.weights
        return shape.blocks * sum(self.trained_of(i, o) for _, i, o in shape.linears())


def packed_bits(bits: int, group_size: int = 64) -> float:
    """Give the stored bits per weight: a code, and a 16-bit scale and a zero point a group."""
    return bits + (SCALE + bits) / group_size


METHODS = (
    Method("full"),
    Method("LoRA r=16", rank=16),
    Method("RoAd 1", per_pair=1),
    *(
        Method(f"ApiQ {b} bits, r=16", rank=16, bits=packed_bits(b), whole_bits=SCALE / 64)
        for b in (4, 3, 2)
    ),
)


@dataclass(frozen=True)
class Step:
    """What one device holds and sends in a step."""

    weights: float  # bytes of parameters that stay on it, trained ones included
    trained: float  # bytes of gradients and of Adam's moments
    gathered: float  # bytes of parameters that are whole for a while
    checkpoints: float  # bytes of the inputs of the blocks, kept for the backward
    sent: float  # bytes on the wire, out of the device

    @property
    def held(self) -> float:
        """All bytes at once, without the activations of the block that is recomputed."""
        return self.weights + self.trained + self.gathered + self.checkpoints


def all_reduced(size: float, devices: int) -> float:
    """Give the bytes that a device sends in a ring all-reduce of `size` bytes."""
    return 2 * (devices - 1) / devices * size


def gathered(size: float, devices: int) -> float:
    """Give the bytes that it sends in a ring all-gather (or reduce-scatter) of `size` in all."""
    return (devices - 1) / devices * size


def frozen(shape: Shape, method: Method) -> tuple[float, float, float]:
    """Give the bytes of frozen tensors: parameters of a block, its scales, those outside."""
    if method.full:
        return 0.0, 0.0, 0.0
    norms = 2 * shape.hidden * HALF
    linears, scales = (shape.block_linears * b / 8 for b in (method.bits, method.whole_bits))
    return norms + linears - scales, scales, shape.root * HALF


def ddp(shape: Shape, method: Method, devices: int, tokens: int) -> Step:
    """Every device has everything; gradients are all-reduced. `tokens` are those of one device.

    DDP sends buffers as well, if it is not told `broadcast_buffers=False`, as it is taken to be.
    """
    block, scales, root = frozen(shape, method)
    trained = method.trained(shape) * FULL
    return Step(
        weights=shape.blocks * (block + scales) + root + trained,
        trained=trained * (1 + ADAM / FULL),
        gathered=0,
        checkpoints=_checkpoints(shape, tokens),
        sent=all_reduced(trained, devices),
    )


def fsdp2(shape: Shape, method: Method, devices: int, tokens: int) -> Step:
    """Parameters, gradients and moments are sharded; scales, which are buffers, are not.

    A block is gathered for the forward and again for the backward, what is outside once. Two blocks
    are whole at a time: the next is on its way.
    """
    block, scales, root = frozen(shape, method)
    trained = method.trained(shape) * FULL
    of_root = shape.root * FULL if method.full else 0
    of_block = (trained - of_root) / shape.blocks
    whole = block + of_block
    return Step(
        weights=(shape.blocks * whole + root + of_root) / devices + shape.blocks * scales,
        trained=trained * (1 + ADAM / FULL) / devices,
        gathered=2 * whole + root + of_root,
        checkpoints=_checkpoints(shape, tokens),
        sent=gathered(2 * shape.blocks * whole + root + of_root, devices)
        + gathered(trained, devices),
    )


def tp(shape: Shape, method: Method, devices: int, tokens: int) -> Step:
    """Every layer is split; outputs are added up. `tokens` are those that all devices share.

    Column-parallel layers hold a share of what is trained on outputs, row-parallel ones of what is
    trained on inputs; the rest is whole everywhere. A RoAd adds nothing to what is sent.
    """
    norms = (2 * shape.blocks + 1) * shape.hidden  # whole on every device
    split = (shape.weights - norms) / devices + norms
    if method.full:
        held, fixed = split, 0.0
        whole = shape.vocabulary * shape.hidden * FULL  # the gradient of a lookup is not split
        beside = whole * (devices - 1) / devices
    else:
        linears = shape.linears()
        held = shape.blocks * sum(_tp_share(n, i, o, method, devices) for n, i, o in linears)
        fixed, beside = split, 0.0
    return Step(
        weights=fixed * HALF + held * FULL,
        trained=held * (FULL + ADAM) + beside,
        gathered=0,
        checkpoints=_checkpoints(shape, tokens),
        sent=tp_sent(shape, method, devices, tokens),
    )


def tp_sent(shape: Shape, method: Method, devices: int, tokens: int, width: int = HALF) -> float:
    """Give the bytes that a device sends in tensor parallelism, activations of `width` bytes.

    Forward: the embedding and two sums a block are all-reduced, logits are gathered. Backward: a
    column-parallel layer's input gradient is all-reduced, but for the first block's three where the
    embeddings are frozen. A LoRA adds its low-rank activations (or their gradients) up, in float32.
    """
    activation = tokens * shape.hidden * width
    columns = 5 * shape.blocks - (0 if method.full else 3)
    sums = 1 + 2 * shape.blocks + columns + 1  # the last is that of the head's input
    logits = tokens * shape.vocabulary * width
    low_rank = len(shape.linears()) * shape.blocks * tokens * method.rank * FULL
    return all_reduced(sums * activation + low_rank, devices) + gathered(logits, devices)


def _tp_share(name: str, inputs: int, outputs: int, method: Method, devices: int) -> float:
    a, b = method.rank * inputs, method.rank * outputs
    road = outputs * method.per_pair
    if name in ROW_PARALLEL:
        return a / devices + b + road
    return a + (b + road) / devices


def _checkpoints(shape: Shape, tokens: int) -> float:
    return shape.blocks * tokens * shape.hidden * HALF


ENGINES = {"DDP": ddp, "FSDP2": fsdp2, "TP": tp}


def table(devices: int, tokens: int) -> Iterator[tuple[str, str, str, Step | None]]:
    """Give shape, method, engine and what a device holds and sends; None for what is not there."""
    for shape in SHAPES:
        for method in METHODS:
            for name, engine in ENGINES.items():
                there = not (method.packed and name == "TP")  # packed layers cannot be split
                yield (
                    *(shape.name, method.name, name),
                    engine(shape, method, devices, tokens) if there else None,
                )
