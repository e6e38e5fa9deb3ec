"""The converter of multilingual-e5-small, on a small file of the same layout."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from recipes_peft import assets, e5, encoders
from recipes_peft.errors import UserError

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "▁ab", "é"]
HIDDEN, LAYERS, INNER, POSITIONS = 32, 1, 64, 16


def packed(weights: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """Round weights to blocks of four bits; give the bytes and what they stand for."""
    blocks = weights.reshape(-1, 32)
    scales = (blocks.abs().amax(1, keepdim=True) / 7).half()
    codes = (blocks / scales.float()).round().clamp(-8, 7)
    unsigned = (codes + 8).to(torch.uint8)
    data = b"".join(
        scale.numpy().tobytes() + (row[:16] | row[16:] << 4).numpy().tobytes()
        for scale, row in zip(scales, unsigned, strict=True)
    )
    return data, (codes * scales.float()).reshape(weights.shape)


def write(file: Path) -> dict[str, torch.Tensor]:
    """Write a small file; give the tensors that it holds."""
    torch.manual_seed(0)
    shapes = {
        "emb.word": (len(PIECES), HIDDEN),
        "emb.pos": (POSITIONS, HIDDEN),
        "emb.type": (2, HIDDEN),
        "emb.ln.w": (HIDDEN,),
        "emb.ln.b": (HIDDEN,),
    }
    for part, (rows, columns) in {
        "q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN),
        "ao": (HIDDEN, HIDDEN), "fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER),
    }.items():  # fmt: skip
        shapes |= {f"l0.{part}.w": (rows, columns), f"l0.{part}.b": (rows,)}
    for part in ("aln", "oln"):
        shapes |= {f"l0.{part}.w": (HIDDEN,), f"l0.{part}.b": (HIDDEN,)}

    blob = "".join(PIECES).encode()
    offsets = [len("".join(PIECES[:i]).encode()) for i in range(len(PIECES) + 1)]
    sizes = (HIDDEN, LAYERS, 1, INNER, len(PIECES), POSITIONS, 2)
    head = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(blob))
    head += struct.pack(f"<{len(offsets)}I", *offsets)
    head += struct.pack(f"<{len(PIECES)}f", *(-float(i) for i in range(len(PIECES))))
    head += blob + struct.pack("<iI", 0, 3) + b"map" + struct.pack("<i", len(shapes))
    entries, parts, kept = [], [], {}
    for name, shape in shapes.items():
        value = torch.randn(shape)
        four_bits = name.endswith(".w") and len(shape) == 2
        data, kept[name] = packed(value) if four_bits else (value.numpy().tobytes(), value)
        entries.append((name.encode(), int(four_bits), value.numel(), len(data)))
        parts.append(data)
    start = len(head) + sum(2 + len(name) + 21 for name, *_ in entries)
    for (name, kind, numel, length), _ in zip(entries, parts, strict=True):
        head += (
            struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, numel, start, length)
        )
        start += length
    file.write_bytes(head + b"".join(parts))
    return kept


def test_weights_and_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    kept = write(tmp_path / "small.bin")
    e5.convert(tmp_path / "small.bin", tmp_path / "model")
    state = AutoModel.from_pretrained(tmp_path / "model").state_dict()
    for name, ours in {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.ln.b": "embeddings.LayerNorm.bias",
        "l0.q.w": "encoder.layer.0.attention.self.query.weight",
        "l0.ao.b": "encoder.layer.0.attention.output.dense.bias",
        "l0.fi.w": "encoder.layer.0.intermediate.dense.weight",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.oln.w": "encoder.layer.0.output.LayerNorm.weight",
    }.items():
        assert torch.equal(state[ours], kept[name]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    pair = tokenizer("ab", "a  b")
    assert tokenizer.convert_ids_to_tokens(pair.input_ids) == [
        "<s>", "▁ab", "</s>", "</s>", "▁", "a", "▁", "b", "</s>",
    ]  # fmt: skip
    assert "token_type_ids" not in pair
    assert tokenizer("e\u0301").input_ids == [0, 4, 8, 2]  # composed first
    assert tokenizer.pad_token_id == 1


def test_it_has_a_name_and_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROAD_APIQ_CACHE", str(tmp_path))
    write(tmp_path / assets.ASSETS["e5-small"].file)
    model, _ = encoders.load_classifier("e5-small", 2)
    assert model.config.hidden_size == HIDDEN
    (tmp_path / assets.ASSETS["e5-small"].file).unlink()
    assert encoders.load_reader("e5-small")[0].qa_outputs.out_features == 2


@pytest.mark.parametrize("what", ["other", "short"])
def test_another_file_is_a_sentence(tmp_path: Path, what: str) -> None:
    write(tmp_path / "small.bin")
    whole = (tmp_path / "small.bin").read_bytes()
    torn = {"other": b"GGUF" + whole[4:], "short": whole[:-8]}[what]
    (tmp_path / "torn.bin").write_bytes(torn)
    with pytest.raises(UserError, match="is not the file of multilingual-e5-small"):
        e5.convert(tmp_path / "torn.bin", tmp_path / "model")
    assert not (tmp_path / "model").exists()
