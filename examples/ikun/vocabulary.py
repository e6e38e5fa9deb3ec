"""Extend a tokenizer and its model: new pieces for languages that the base cuts to crumbs.

The base's BPE is continued: its own merges stay as they are, and new ones are learned on top of the
base's segmentation, the pair that saves most tokens first. So a text is cut by the base first and
then joined by the new merges; put a new piece's base tokens in its place, and the base's very own
segmentation is back. A pair that occurs in the protected language is never merged. The vocabulary,
not `add_tokens`, grows: added tokens would be matched before the model's own pieces.
"""

from __future__ import annotations

import heapq
import json
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes_peft.errors import UserError

Pair = tuple[str, str]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # how SentencePiece writes a space: the beginning of a word


def length_ratio(lengths: Sequence[int], english: Sequence[int]) -> float:
    """Give how many tokens a language takes for one of English, averaged over aligned texts.

    Source:
        IKUN (arXiv:2408.11512) as third parties describe it: len(tok(x)) / len(tok(y)).
    """
    return sum(a / b for a, b in zip(lengths, english, strict=True)) / len(lengths)


def lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text, without special tokens."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]


@dataclass(frozen=True)
class Extension:
    """A longer vocabulary: the tokenizer, the ids of the new pieces, each one's base tokens."""

    tokenizer: Any
    ids: list[int]
    segments: list[list[int]]

    def expanded(self, ids: Iterable[int]) -> list[int]:
        """Put the base tokens in the place of new pieces."""
        known = dict(zip(self.ids, self.segments, strict=True))
        return [base for i in ids for base in known.get(i, [i])]

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        found = json.dumps({"ids": self.ids, "segments": self.segments})
        (folder / "extension.json").write_text(found, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Extension:
        found = json.loads((folder / "extension.json").read_text(encoding="utf-8"))
        return cls(AutoTokenizer.from_pretrained(folder), found["ids"], found["segments"])


def learn(
    words: Mapping[tuple[str, ...], int],
    count: int,
    allowed: Callable[[Pair], bool] = lambda _: True,
) -> list[Pair]:
    """Learn merges until there are `count` new pieces, the most frequent pair first.

    `words` are segmented already, with how often each occurs. Of equally frequent pairs the first
    in the alphabet is taken; a pair that occurs once saves nothing and ends the search.
    """
    cut = [list(word) for word in words]
    often = list(words.values())
    counts: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for number, word in enumerate(cut):
        for pair in pairwise(word):
            counts[pair] += often[number]
            where[pair].add(number)
    queue = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    pieces: set[str] = set()
    while queue and len(pieces) < count:
        negative, pair = heapq.heappop(queue)
        if -negative != counts[pair]:
            continue  # its count has changed since; the new one is in the queue as well
        if -negative < 2:
            break
        if not allowed(pair):
            continue
        merges.append(pair)
        pieces.add("".join(pair))
        changed: set[Pair] = set()
        for number in where.pop(pair):
            old, new = cut[number], joined(cut[number], pair)
            for before in pairwise(old):
                counts[before] -= often[number]
                changed.add(before)
            for after in pairwise(new):
                counts[after] += often[number]
                where[after].add(number)
                changed.add(after)
            cut[number] = new
        for other in changed - {pair}:
            heapq.heappush(queue, (-counts[other], other))
    return merges


def joined(word: Sequence[str], pair: Pair) -> list[str]:
    """Merge a pair wherever it stands in a segmented word, from the left."""
    made: list[str] = []
    i = 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        made.append("".join(pair) if both else word[i])
        i += 2 if both else 1
    return made


def extend(
    tokenizer: Any,
    texts: Sequence[str],
    protected: Sequence[str],
    size: int,
    multiple: int = 1,
    enough: Callable[[Any], bool] | None = None,
) -> Extension:
    """Learn at most `size` new pieces from texts; `protected` texts are cut as before.

    The size of the whole vocabulary becomes a multiple of `multiple`, so that the embeddings need
    no rows without a token. With `enough`, which must stay true once it is, pieces end with the
    first number of them that is enough.

    Raises:
        UserError: the tokenizer is no BPE, or the texts have too little to learn from.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise UserError(
            f"the tokenizer is of the kind {content['model']['type']}; only a BPE can be continued,"
            " so choose another model, or runs without a new vocabulary"
        )
    characters = _missing(tokenizer, content, texts)[:size]
    start = rebuilt(tokenizer, characters, [])
    base = start.get_vocab()
    kept = {pair for word in _words(start, protected) for pair in pairwise(word)}

    def allowed(pair: Pair) -> bool:
        piece = "".join(pair)
        bytes_alone = any(_BYTE.fullmatch(part) for part in pair)
        return pair not in kept and piece not in base and not bytes_alone

    merges = learn(_words(start, texts), size - len(characters), allowed)
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    room = len(characters) + len(made)

    def first(number: int) -> Any:
        """Give the tokenizer with this many of the new pieces."""
        some = (characters + made)[:number]
        return rebuilt(tokenizer, some, _ending_in(merges, set(some)))

    if enough is not None:
        room = min(room, bisect_left(range(room), True, key=lambda n: enough(first(n))))
    room -= (first_id(tokenizer) + room) % multiple
    if room <= 0:
        raise UserError(
            f"the texts give {len(characters) + len(made)} new pieces, too few for a vocabulary"
            f" whose size is a multiple of {multiple}; give more text, or a smaller multiple"
        )
    pieces, known = (characters + made)[:room], tokenizer.get_vocab()
    segments = {token: [i] for token, i in known.items()}
    segments |= {sign: [known[byte] for byte in _bytes(sign)] for sign in characters}
    for left, right in _ending_in(merges, set(pieces)):
        segments.setdefault(left + right, segments[left] + segments[right])
    begin = first_id(tokenizer)
    ids = list(range(begin, begin + room))
    return Extension(first(room), ids, [segments[piece] for piece in pieces])


def rebuilt(tokenizer: Any, pieces: Sequence[str], merges: Sequence[Pair]) -> Any:
    """Give the tokenizer with further pieces, whose ids follow its own, and with further merges."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    for token in content["added_tokens"]:
        # A special token outside of the vocabulary is numbered anew when the vocabulary grows.
        model["vocab"].setdefault(token["content"], token["id"])
    begin = first_id(tokenizer)
    model["vocab"] |= {piece: begin + i for i, piece in enumerate(pieces)}
    model["merges"] += [list(pair) for pair in merges]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
    made.chat_template = tokenizer.chat_template
    return made


def first_id(tokenizer: Any) -> int:
    """Give the first id that no token has and none below it lacks a use for."""
    return max(tokenizer.get_vocab().values()) + 1


def lossless(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Tell whether every text comes back from its tokens, sign by sign."""
    coded = tokenizer(list(texts), add_special_tokens=False).input_ids
    return all(
        tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        for ids, text in zip(coded, texts, strict=True)
    )


def expands_to_base(extension: Extension, tokenizer: Any, texts: Sequence[str]) -> bool:
    """Tell whether new pieces, taken apart, give the base's own tokens of every text."""
    new, old = (t(list(texts)).input_ids for t in (extension.tokenizer, tokenizer))
    return [extension.expanded(ids) for ids in new] == old


def mean_rows(weight: torch.Tensor, segments: Sequence[Sequence[int]]) -> torch.Tensor:
    """Give, for each list of row numbers, the mean of these rows of `weight`.

    Shapes:
        weight: (rows, d). Returns (len(segments), d).
    """
    means = [weight[list(rows)].float().mean(0) for rows in segments]
    return torch.stack(means).to(weight.dtype)


@torch.no_grad()
def extend_model(model: Any, extension: Extension) -> Any:
    """Give the model rows for new pieces: of what goes in and what comes out, tied or not.

    A new row is the mean of the rows of the piece's base tokens.
    """
    rows = max(model.get_input_embeddings().weight.shape[0], extension.ids[-1] + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        # Tied weights are set twice to the same values: the means are of base rows alone.
        module.weight[extension.ids] = mean_rows(module.weight, extension.segments)
    return model


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, columns: int) -> torch.Tensor:
    """Give the logits of the first `columns` tokens, those of the base, in float32."""
    return model.eval()(input_ids=ids.to(model.device)).logits[..., :columns].float().cpu()


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Give the largest difference, relative to the largest value before."""
    return ((after - before).abs().max() / before.abs().max()).item()


def new_rows(model: Any, extension: Extension) -> dict[str, list[int]]:
    """Name the matrices that have rows for new pieces: one if they are tied, else two."""
    wanted = {id(model.get_input_embeddings())}
    if not model.config.get_text_config().tie_word_embeddings:
        wanted.add(id(model.get_output_embeddings()))
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    return {name.rpartition(".")[2]: list(extension.ids) for name in names}


def _words(tokenizer: Any, texts: Iterable[str]) -> Counter[tuple[str, ...]]:
    """Count the words of texts as the tokenizer sees them, each cut into its tokens."""
    inner = tokenizer.backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_pretokens(inner, text))
    found: Counter[tuple[str, ...]] = Counter()
    for word, often in words.items():
        found[tuple(token.value for token in inner.model.tokenize(word))] += often
    return found


def _pretokens(inner: Tokenizer, text: str) -> Iterator[str]:
    if inner.normalizer is not None:
        text = inner.normalizer.normalize_str(text)
    if inner.pre_tokenizer is not None:
        parts = [part for part, _ in inner.pre_tokenizer.pre_tokenize_str(text)]
    else:
        parts = [text]  # SentencePiece's BPE sees a whole text; no piece shall cross a space
    for part in parts:
        yield from re.findall(f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+", part)


def _missing(tokenizer: Any, content: Any, texts: Iterable[str]) -> list[str]:
    """Give the signs that a BPE with bytes to fall back on has no token for, frequent ones first.

    One of bytes alone has none: there merges make signs as they make words.
    """
    if not content["model"].get("byte_fallback"):
        return []
    inner, vocabulary = tokenizer.backend_tokenizer, content["model"]["vocab"]
    signs: Counter[str] = Counter()
    for text in texts:
        for word in _pretokens(inner, text):
            signs.update(word)
    new = [(-n, sign) for sign, n in signs.items() if sign not in vocabulary and n > 1]
    return [sign for _, sign in sorted(new)]


def _bytes(sign: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in sign.encode()]


def _ending_in(merges: Iterable[Pair], pieces: set[str]) -> list[Pair]:
    """Give the merges whose result is among the pieces; what they join is then as well."""
    return [pair for pair in merges if "".join(pair) in pieces]
