"""Text to pretrain on: parted by document, tokenised once into files, read as windows.

Tokens stand end to end in shards, memory-mapped when they are read, so a corpus need not fit in
memory. A window begins with the tokenizer's first token; documents are parted by its last.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from recipes_peft import assets, boolq, data, tiny
from recipes_peft.errors import UserError, explained

__all__ = ["Windows", "causal", "make_tokenizer", "masked", "read", "write_tokens"]

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
WIKITEXT = {"train": "valid.txt", "held": "test.txt"}  # of the folder


def read(
    names: Sequence[str], test: str | None, share: float
) -> tuple[Iterator[str], Iterator[str]]:
    """Give texts to train on and held out, as they are read: `boolq`, files, or a hub's data sets.

    Held out are the texts of `test`, or whole groups chosen by a checksum, about `share` of all.

    Raises:
        UserError: a name means nothing, or a file cannot be read.
    """
    if test is not None:
        return (t for n in names for _, t in _texts(n, "train")), (
            t for _, t in _texts(test, "held")
        )
    if any(name.startswith("wikitext2:") for name in names):
        return (t for n in names for _, t in _texts(n, "train")), (
            t for n in names if n.startswith("wikitext2:") for _, t in _texts(n, "held")
        )

    def part(held: bool) -> Iterator[str]:
        for name in names:
            for group, text in _texts(name, "train"):
                drawn = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 2**32
                if (drawn < share) == held:
                    yield text

    return part(False), part(True)


def _texts(name: str, side: str) -> Iterator[tuple[str, str]]:
    """Give groups and texts by a name."""
    kind, _, rest = name.partition(":")
    if name == "boolq":
        found: Iterable[data.Example] = boolq.passages(assets.fetch("boolq"))
    elif name == "tiny":
        found = tiny.examples(200)
    elif kind == "wikitext2":
        yield from _articles(Path(rest), WIKITEXT[side])
        return
    elif kind == "hub":
        yield from _streamed(rest)
        return
    else:
        found = data.read(Path(name))
    for example in found:
        between = "" if example.raw else "\n"
        yield example.group, f"{example.prompt}{between}{example.answer}"


def _articles(folder: Path, file: str) -> Iterator[tuple[str, str]]:
    """Give the articles of a file of WikiText-2, packed or not."""
    path = next((p for p in (folder / file, folder / f"{file}.xz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {file}; give the folder of WikiText-2 (see the README)")
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
        article: list[str] = []
        for line in lines:
            title = line.startswith(" = ") and not line.startswith(" = = ")
            if title and article:
                yield article[0], "".join(article).strip()
                article = []
            article.append(line)
        yield article[0], "".join(article).strip()


def _streamed(name: str) -> Iterator[tuple[str, str]]:
    from datasets import load_dataset  # type: ignore[import-untyped]

    place, _, subset = name.partition(":")
    with explained(Exception, before=f"cannot read {place} from the hub: "):
        rows = load_dataset(place, subset or None, split="train", streaming=True)
    for row in rows:
        yield row["text"], row["text"]


# ---- tokens -------------------------------------------------------------------------------------


def make_tokenizer(name: str, texts: Iterable[str]) -> Any:
    """Give a tokenizer: `bytes`, `bpe:SIZE` learned on the texts, or one by folder or hub id.

    Its `cls` token begins a window and its `sep` token ends a text; others are made so.

    Raises:
        UserError: there is no such tokenizer, or it lacks a token.
    """
    kind, _, size = name.partition(":")
    if kind not in ("bytes", "bpe"):
        with explained(OSError, ValueError, before=f"cannot load the tokenizer {name!r}: "):
            found = AutoTokenizer.from_pretrained(name)
        found.cls_token = found.cls_token or found.bos_token
        found.sep_token = found.sep_token or found.eos_token
        found.pad_token = found.pad_token or found.eos_token
        if None in (found.cls_token, found.sep_token):
            raise UserError(f"the tokenizer {name!r} has no token to begin or end a text with")
        return found
    if kind == "bpe" and not size.isdigit():
        raise UserError(f"the tokenizer is {name!r}; write bpe:SIZE, such as bpe:4096")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    signs = {sign: i for i, sign in enumerate([*SPECIAL.values(), *alphabet])}
    inner = Tokenizer(models.BPE(signs, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bpe")
    inner.decoder = decoders.ByteLevel()
    if kind == "bpe":
        how = trainers.BpeTrainer(
            vocab_size=int(size),
            special_tokens=list(SPECIAL.values()),
            initial_alphabet=alphabet,
            show_progress=False,
        )
        inner.train_from_iterator(texts, how)
    names = {f"{key}_token": sign for key, sign in SPECIAL.items()}
    ends = {"bos_token": SPECIAL["cls"], "eos_token": SPECIAL["sep"]}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **ends)


def write_tokens(
    texts: Iterable[str], tokenizer: Any, folder: Path, most: int | None, shard: int = 2**26
) -> None:
    """Write the tokens of texts, each with its end, into shards `00000.safetensors` and so on.

    `most` is how many tokens are enough.

    Raises:
        UserError: there is no text.
    """
    folder.mkdir(parents=True)
    ids: list[int] = []
    written = number = 0

    def flush(count: int) -> None:
        nonlocal ids, written, number
        tensor = torch.tensor(ids[:count], dtype=torch.int32)
        save_file({"ids": tensor}, folder / f"{number:05d}.safetensors")
        ids, written, number = ids[count:], written + len(tensor), number + 1

    texts = iter(texts)
    with tqdm(desc=f"tokens, {folder.name}", unit="tok", unit_scale=True) as bar:
        while chunk := list(islice(texts, 256)):
            before = len(ids)
            for row in tokenizer(chunk, add_special_tokens=False).input_ids:
                ids += [*row, tokenizer.sep_token_id]
            bar.update(len(ids) - before)
            while len(ids) >= shard:
                flush(shard)
            if most and written + len(ids) >= most:
                break
    if most:
        ids = ids[: max(0, most - written)]
    if ids:
        flush(len(ids))
    if not number:
        raise UserError(f"there is no text for {folder.name}; give more data")


class Windows(Dataset[list[int]]):
    """Windows of `length` tokens side by side: a first token, and the next of the shards.

    What does not fill a window at the end of a shard is dropped.

    Raises:
        UserError: the text fills no window.
    """

    def __init__(self, folder: Path, length: int, first: int) -> None:
        self.inside, self.first = length - 1, first
        self.shards: list[Any] = []
        self.counts: list[int] = []
        for path in sorted(folder.glob("*.safetensors")):
            shard = safe_open(path, framework="pt").get_slice("ids")
            self.shards.append(shard)
            self.counts.append(shard.get_shape()[0] // self.inside)
        if not len(self):
            raise UserError(f"the text in {folder.name} fills no window of {length}; give more")

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> list[int]:
        for shard, count in zip(self.shards, self.counts, strict=True):
            if index < count:
                start = index * self.inside
                return [self.first, *shard[start : start + self.inside].tolist()]
            index -= count
        raise IndexError(index)


# ---- batches ------------------------------------------------------------------------------------


def causal(rows: Sequence[list[int]]) -> dict[str, Tensor]:
    """Make a batch in which every token but the first is predicted, (rows, length) each."""
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids.clone()}


def masked(tokenizer: Any, probability: float, seed: int | None = None) -> Any:
    """Give what makes a batch with masked tokens to predict, in BERT's proportions.

    With a seed it masks the same at every call; without one torch's own numbers decide.
    """
    inner = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability)

    def join(rows: Sequence[list[int]]) -> dict[str, Tensor]:
        if seed is None:
            return dict(inner(list(rows)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return dict(inner(list(rows)))

    return join
