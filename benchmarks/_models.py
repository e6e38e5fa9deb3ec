"""The models that adapters are put on: a linear layer, transformer blocks, a language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks._cases import LINEARS, SHAPES, ServeCase, StackCase

LINEARS_OF_BLOCK = tuple(f"{name}_proj" for name in LINEARS)
VOCABULARY = 256  # small, since neither embeddings nor logits are adapted


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

    targets = LINEARS_OF_BLOCK

    def __init__(self, case: StackCase) -> None:
        super().__init__()
        self.width = SHAPES[case.shape].hidden
        self.blocks = LlamaModel(_config(case.shape, case.blocks, vocabulary=8))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(inputs_embeds=x, use_cache=False).last_hidden_state


def language_model(case: ServeCase, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Give a Llama with random weights that generates for as long as it is told to."""
    with device:
        model = AutoModelForCausalLM.from_config(
            _config(case.shape, case.blocks, VOCABULARY), dtype=dtype
        )
    return model.eval().requires_grad_(False)


def _config(shape_name: str, blocks: int, vocabulary: int) -> LlamaConfig:
    shape = SHAPES[shape_name]
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,  # no token ends a generation
    )


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
