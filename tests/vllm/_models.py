"""A tiny model on disk with a tokenizer, adapters of every kind, and what transformers answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from road_peft import RoadConfig

VOCABULARY = 96
LENGTH = 6  # tokens of an answer
LOGPROB = 1e-4  # how far log-probabilities of float32 may be apart, absolute
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# by name: every variant, several group sizes, layers that differ, and a tail that does not rotate
ROADS: dict[str, dict[str, Any]] = {
    "one": {"variant": "road_1", "group_size": 64},
    "two": {"variant": "road_2", "group_size": 32},
    "four": {"variant": "road_4", "group_size": 2},
    "some": {"variant": "road_1", "group_size": 16, "target_modules": ["q_proj", "down_proj"]},
    "narrow": {"variant": "road_2", "group_size": 8, "target_modules": ["k_proj", "up_proj"]},
    "mixed": {
        "variant": "road_1",
        "group_size": 4,
        "group_size_pattern": {"k_proj": 64, "gate_proj": 16},
        "variant_pattern": {"v_proj": "road_4"},
    },
    "tail": {"variant": "road_4", "group_size": 48, "remainder": "identity"},
}
LORAS: dict[str, dict[str, Any]] = {
    "low": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "low_some": {"r": 8, "lora_alpha": 8, "target_modules": ["v_proj", "gate_proj"]},
}


def save_base(folder: Path, **sizes: Any) -> Path:
    """Write a tiny Llama with random weights and a tokenizer of numbered words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            "tie_word_embeddings": False,
            **sizes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="w2"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="w2"
    ).save_pretrained(folder)
    return folder


def save_adapters(model: Any, configs: Mapping[str, Any], folder: Path, seed: int = 1) -> PeftModel:
    """Put random adapters on `model`, write each as PEFT does, and give the adapted model."""
    torch.manual_seed(seed)
    names = iter(configs)
    first = next(names)
    adapted: Any = get_peft_model(model, configs[first], adapter_name=first)
    for name in names:
        adapted.add_adapter(name, configs[name])
    for key, value in adapted.named_parameters():
        if "road_theta" in key:
            torch.nn.init.normal_(value.data, std=0.4)
        elif "road_alpha" in key:
            torch.nn.init.normal_(value.data, mean=1.0, std=0.1)
        elif "lora_B" in key:
            torch.nn.init.normal_(value.data, std=0.1)
    for name in configs:
        adapted.save_pretrained(folder, selected_adapters=[name])
    return adapted.eval()


def road_configs(names: Sequence[str] = tuple(ROADS)) -> dict[str, RoadConfig]:
    """Give configurations of RoAd by name."""
    return {n: RoadConfig(**{"target_modules": ALL, **ROADS[n]}) for n in names}


def lora_configs(names: Sequence[str] = tuple(LORAS)) -> dict[str, LoraConfig]:
    """Give configurations of LoRA by name."""
    return {n: LoraConfig(**LORAS[n]) for n in names}


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]

    def check(self, other: Answer, what: str) -> None:
        """Fail unless `other` is the same answer."""
        assert other.tokens == self.tokens, f"{what}: {other.tokens}, not {self.tokens}"
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        error = max(abs(a - b) for a, b in pairs)
        assert error <= LOGPROB, f"{what}: log-probabilities differ by {error:.3g}"


@torch.no_grad()
def expected(model: Any, prompt: Sequence[int]) -> Answer:
    """Give the answer of transformers, one request alone."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
        pad_token_id=1,
    )
    tokens = out.sequences[0, len(prompt) :].tolist()
    logits = [step[0].log_softmax(-1) for step in out.logits]
    return Answer(tokens, [float(step[token]) for step, token in zip(logits, tokens, strict=True)])


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    """Give prompts of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=draw).tolist()
    return [torch.randint(2, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]
