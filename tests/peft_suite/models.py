"""Tiny random models under the hub names that PEFT's tests ask for."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.peft_suite.source import appearing

# The spread of the weights is wide so that adapters change what a model generates.
SPREAD = 0.2
# A test that compares generations strips the end token only, so padding uses the same one.
TOKENS = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
BLOCKS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": SPREAD,
}
ENCODER = {**BLOCKS, "vocab_size": 1000}
DECODER = {**BLOCKS, **TOKENS, "num_key_value_heads": 2}
DEBERTA = {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
GPT = {
    **TOKENS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": SPREAD,
}
OPT = {
    **TOKENS,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": SPREAD,
}
T5 = {
    "vocab_size": 1000,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "initializer_factor": 2.0,
}
BART = {
    "vocab_size": 1000,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": SPREAD,
}

# hub name: (class in transformers, settings of its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        {**GPT, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**DECODER, "head_dim": 8, "sliding_window": 32},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", ENCODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", ENCODER),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        ENCODER,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        ENCODER,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        DECODER,
    ),
}

# hub name: revision; the tests read nothing but the configuration of these LoRA adapters
ADAPTERS = {
    "peft-internal-testing/tiny-opt-lora-revision": "test",
    "ybelkada/test-st-lora": "main",
}


def hub(cache: Path) -> Path:
    """Return a hub cache that holds every model of the tables, built if it is not in `cache`.

    The name of the folder follows from the tables and from what turns them into weights.
    """
    versions = [f"{name}-{version(name)}" for name in ("torch", "transformers", "peft")]
    key = hashlib.sha256("\n".join([Path(__file__).read_text(), *versions]).encode())
    folder = cache / f"hub-{key.hexdigest()[:12]}"
    if not folder.is_dir():
        with appearing(folder) as fresh:
            _build(fresh)
    return folder


def _build(folder: Path) -> None:
    """Save all models and adapter configurations into the hub cache `folder`."""
    # here and not above: a run that finds the folder needs none of them, and they load slowly
    import torch
    import transformers
    from peft import LoraConfig

    transformers.utils.logging.disable_progress_bar()
    for seed, (name, (class_name, settings)) in enumerate(MODELS.items()):
        model_class = getattr(transformers, class_name)
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings))
        model.save_pretrained(_snapshot(folder, name, "main"))
    for name, revision in ADAPTERS.items():
        snapshot = _snapshot(folder, name, revision)
        LoraConfig(target_modules=["q_proj"]).save_pretrained(str(snapshot))


def _snapshot(folder: Path, name: str, revision: str) -> Path:
    """Return the folder in which a hub cache looks for `revision` of the repository `name`."""
    repository = folder / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
    return snapshot
