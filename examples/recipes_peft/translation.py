"""Translation with a causal language model: prompts, rows, greedy answers, and scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from recipes_peft import data, loop
from recipes_peft.data import Encoded, Example
from recipes_peft.errors import UserError, explained
from recipes_peft.parallel import LANGUAGES, Pair

__all__ = ["Scores", "comet", "encode", "first_line", "prompt", "score", "translate"]


@dataclass(frozen=True)
class Scores:
    """chrF++ and BLEU of a set of translations, 0 to 100, and how sacrebleu computed them."""

    chrf: float
    bleu: float
    chrf_signature: str
    bleu_signature: str


def prompt(source: Pair | str, source_language: str = "", target_language: str = "") -> str:
    """Give the text to continue with a translation; a pair brings its own languages.

    Not a chat template: the same words for every model, without instructions to follow.
    """
    if isinstance(source, Pair):
        source_language = source_language or source.source_language
        target_language = target_language or source.target_language
        source = source.source
    return f"{_name(source_language)}: {source}\n{_name(target_language)}:"


def encode(pair: Pair, tokenizer: Any, max_length: int) -> Encoded:
    """Give the tokens of a pair: the prompt, and the translation with an end, which is learnt.

    Too long a prompt loses its beginning, too long a translation its end.
    """
    example = Example(prompt(pair), f" {pair.target}", pair.document, raw=True)
    return data.encode(example, tokenizer, max_length)


def translate(
    model: Any,
    tokenizer: Any,
    sources: Sequence[Pair | str],
    source_language: str = "",
    target_language: str = "",
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Translate greedily, in batches padded on the left; of an answer the first line counts."""
    prompts = (prompt(source, source_language, target_language) for source in sources)
    rows = [Encoded(tokenizer(text).input_ids, []) for text in prompts]
    answers = loop.generate(model, tokenizer, rows, max_new_tokens, batch_size)
    return [first_line(answer) for answer in answers]


def first_line(answer: str) -> str:
    """Give what counts of a generated answer: a base model goes on with another example."""
    # what was cut off is marked, for a reader and not for a score
    return answer.removesuffix(" ...").strip().split("\n")[0].strip()


def score(hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> Scores:
    """Score translations with sacrebleu: chrF++ (words up to pairs) and BLEU of the corpus.

    `tokenize` is BLEU's: `zh`, `ja-mecab`, `ko-mecab` or `char` where 13a finds no words;
    `flores200` gives spBLEU, if its model is on this machine already.

    Raises:
        UserError: not as many translations as references, none, or no such tokenizer here.
    """
    if len(hypotheses) != len(references) or not references:
        raise UserError(
            f"there are {len(hypotheses)} translations and {len(references)} references; give as"
            " many of both, at least one"
        )
    if tokenize in SPM_MODELS:
        file = Path(SACREBLEU_DIR) / "models" / SPM_MODELS[tokenize]["url"].rpartition("/")[2]
        if not file.exists():  # sacrebleu would download it
            raise UserError(
                f"BLEU with {tokenize} needs {file}, which is not there and is not downloaded; put"
                " it there, or choose 13a or char"
            )
    with explained(ValueError, ImportError, RuntimeError, before=f"BLEU with {tokenize}: "):
        bleu = BLEU(tokenize=tokenize)
    chrf = CHRF(word_order=2)
    wanted = [list(references)]
    return Scores(
        chrf.corpus_score(list(hypotheses), wanted).score,
        bleu.corpus_score(list(hypotheses), wanted).score,
        str(chrf.get_signature()),
        str(bleu.get_signature()),
    )


def comet(
    checkpoint: Path,
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[str],
    batch_size: int = 8,
) -> float:
    """Give the mean COMET score by a checkpoint on this machine, on the CPU.

    Of the checkpoint only tensors and plain values are read; one that holds other objects is
    refused. Needs the package `unbabel-comet`.

    Raises:
        UserError: there is no such package or checkpoint, or it cannot be read so.
    """
    if find_spec("comet") is None:
        raise UserError("COMET needs the package unbabel-comet; install it, or leave COMET out")
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint {checkpoint}; give a file of COMET (.ckpt)")
    from comet import load_from_checkpoint  # type: ignore[import-not-found]

    with _weights_only(), explained(Exception, before=f"cannot load {checkpoint}: "):
        model = load_from_checkpoint(str(checkpoint), local_files_only=True)
    columns = zip(sources, hypotheses, references, strict=True)
    rows = [{"src": s, "mt": h, "ref": r} for s, h, r in columns]
    found = model.predict(rows, batch_size=batch_size, gpus=0, progress_bar=False)
    return float(found["system_score"])


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make torch refuse to unpickle objects, whatever a library asks of it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _name(language: str) -> str:
    """Give a language's English name; what has none is called as it was given."""
    return LANGUAGES[language].name if language in LANGUAGES else language.capitalize()
