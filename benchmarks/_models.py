"""The models that adapters are put on: one linear layer, and a stack of transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks._cases import LINEARS, SHAPES, StackCase


class OneLinear(nn.Module):
    """A model of one linear layer without bias."""

    targets = ("linear",)

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.width = in_features
        self.linear = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Stack(nn.Module):
    """The blocks of a Llama with random weights, from embeddings to the last hidden state."""

    targets = tuple(f"{name}_proj" for name in LINEARS)

    def __init__(self, case: StackCase) -> None:
        super().__init__()
        shape = SHAPES[case.shape]
        self.width = shape.hidden
        self.blocks = LlamaModel(
            LlamaConfig(
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_value_heads,
                num_hidden_layers=case.blocks,
                vocab_size=8,
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(inputs_embeds=x, use_cache=False).last_hidden_state


def random_inputs(base: OneLinear | Stack, batch: int, tokens: int) -> Tensor:
    """Give inputs of `base`, in its dtype and on its device, that require a gradient."""
    weight = next(base.parameters())
    x = torch.randn(batch, tokens, base.width, device=weight.device, dtype=weight.dtype)
    return x.requires_grad_()


def output_bytes(base: OneLinear | Stack) -> int:
    """Give the bytes of one token's outputs, summed over the linears that are adapted."""
    return sum(
        module.out_features * module.weight.element_size()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in base.targets
    )
