"""The ways to have two skills in one intervention: each trains, then answers the test prompts."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from loreft import LoReFTModel
from prefixes import Prefixes, answer_loss
from skills import CUT, Task
from tqdm.auto import tqdm
from transformers import get_scheduler

from recipes_peft import data
from recipes_peft.data import Example
from road_peft import (
    Interventions,
    RoadInterventionConfig,
    RoadInterventionModel,
    SubspaceCollator,
)

Texts = dict[str, list[str]]  # by what is switched on
Row = dict[str, Any]  # prompt and answer, token ids, and the names of subspaces


@dataclass(frozen=True)
class Bench:
    """What all arms share: the base model, the data, and the settings (see run.py)."""

    model: Any
    tokenizer: Any
    task: Task
    pools: tuple[Sequence[Example], Sequence[Example]]  # to train each skill on; may be the same
    test: Sequence[Example]
    given: Any
    prefixes: Prefixes

    def rows(self, seed: int) -> dict[str, list[Row]]:
        """Draw the rows of a seed: of each skill, on paragraphs of its own, and of both skills."""
        count, (first, second), rng = self.given.examples, self.pools, random.Random(seed)
        if first is second:
            drawn = rng.sample(list(first), 2 * count)
            ours, theirs = drawn[:count], drawn[count:]
        else:
            ours, theirs = rng.sample(list(first), count), rng.sample(list(second), count)
        made = {
            name: [self.row(e, skill.answer(e), skill.ends, [name]) for e in examples]
            for (name, skill), examples in zip(
                self.task.skills.items(), (ours, theirs), strict=True
            )
        }
        if (both := self.task.both) is not None:
            made["both"] = [self.row(e, both(e), True, ["both"]) for e in (*ours, *theirs)]
        return made

    def row(self, example: Example, answer: str, ends: bool, subspaces: list[str]) -> Row:
        """Encode a row; an answer of more than `answer_tokens` is cut and does not end."""
        tokens = self.tokenizer(answer, add_special_tokens=False).input_ids
        tokens = tokens + [self.tokenizer.eos_token_id] * ends
        tokens = tokens[: self.given.answer_tokens]
        return {"prompt": self.prompt(example), "answer": tokens, "subspaces": subspaces}

    def prompt(self, example: Example) -> list[int]:
        """Encode a prompt in the model's chat template, if it has one."""
        bare = replace(example, answer="")
        return data.encode(bare, self.tokenizer, self.given.max_length).prompt

    def write(self, model: Any, choices: Mapping[str, list[str]]) -> Texts:
        """Answer every test prompt once for each choice of subspaces, all of them in one batch."""
        texts: Texts = {name: [] for name in choices}
        asked = [(name, example) for example in self.test for name in choices]
        for start in range(0, len(asked), self.given.generated_rows):
            part = asked[start : start + self.given.generated_rows]
            written = self.prefixes.generate(
                model,
                [self.prompt(example) for _, example in part],
                [choices[name] for name, _ in part],
                max_new_tokens=self.given.max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                no_repeat_ngram_size=self.given.no_repeat_ngram_size,
                repetition_penalty=self.given.repetition_penalty,
            )
            for (name, _), tokens in zip(part, written.tolist(), strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                end = "" if self.tokenizer.eos_token_id in tokens else CUT
                texts[name].append(text + end)
        return texts

    def road(self, what: RoadInterventionConfig | Interventions) -> RoadInterventionModel:
        """Wrap the base model."""
        return RoadInterventionModel(self.model, what)

    def config(self, **subspaces: tuple[float, float]) -> RoadInterventionConfig:
        """Give the intervention of the paper: one block's output, the prompt's last tokens."""
        return RoadInterventionConfig(
            layers=[self.given.layer],
            positions=f"l{self.given.last_tokens}",
            variant="road_1",
            group_size=2,
            subspaces=subspaces,
        )


def halves(bench: Bench, seed: int) -> tuple[Texts, dict[str, bool]]:
    """Train one RoAd, each half on its skill; answer with none, each, and both of them."""
    rows, (first, second) = bench.rows(seed), bench.task.skills
    model = bench.road(bench.config(**{first: (0.0, 0.5), second: (0.5, 1.0)}))
    rate = bench.given.learning_rate
    train(bench, model, model.sites.parameters(), rows[first] + rows[second], rate, seed, "halves")
    choices = {"none": [], first: [first], second: [second], "both": [first, second]}
    texts = bench.write(model, choices)
    model.save_pretrained(Path(bench.given.out) / f"halves-{seed}")
    kept = identities(bench, model, [*rows[first][:2], *rows[second][:2]])
    model.detach()
    return texts, kept


def low_rank(bench: Bench, seed: int) -> tuple[Texts, dict[str, bool]]:
    """The same with LoReFT: each skill has half of the rank."""
    rows, (first, second) = bench.rows(seed), bench.task.skills
    given, rank = bench.given, bench.given.loreft_rank
    torch.manual_seed(seed)  # its rotation begins at random
    named = {first: range(rank // 2), second: range(rank // 2, rank)}
    model = LoReFTModel(bench.model, given.layer, given.last_tokens, rank, named)
    rate = given.loreft_learning_rate
    train(bench, model, model.trained(), rows[first] + rows[second], rate, seed, "loreft")
    texts = bench.write(model, {first: [first], second: [second], "both": [first, second]})
    model.detach()
    return texts, {}


def joint(bench: Bench, seed: int) -> tuple[Texts, dict[str, bool]]:
    """Train one RoAd, all of it, on answers that show both skills."""
    model = bench.road(bench.config(both=(0.0, 1.0)))
    rate = bench.given.learning_rate
    train(bench, model, model.sites.parameters(), bench.rows(seed)["both"], rate, seed, "joint")
    texts = bench.write(model, {"both": ["both"]})
    model.detach()
    return texts, {}


def multiplied(bench: Bench, seed: int) -> tuple[Texts, dict[str, bool]]:
    """Train a RoAd for each skill, all of it and apart, and multiply the two."""
    rows, found, texts = bench.rows(seed), [], {}
    for name in bench.task.skills:
        model = bench.road(bench.config(all=(0.0, 1.0)))
        own = [{**row, "subspaces": ["all"]} for row in rows[name]]
        rate = bench.given.learning_rate
        train(bench, model, model.sites.parameters(), own, rate, seed, f"whole, {name}")
        texts |= bench.write(model, {name: ["all"]})
        found.append(model.interventions())
        model.detach()
    model = bench.road(product(*found))
    texts |= bench.write(model, {"both": ["all"]})
    model.detach()
    return texts, {}


ARMS: dict[str, Callable[[Bench, int], tuple[Texts, dict[str, bool]]]] = {
    "halves": halves,
    "loreft": low_rank,
    "joint": joint,
    "multiplied": multiplied,
}


def product(first: Interventions, second: Interventions) -> Interventions:
    """Multiply two RoAd1 of the same subspaces: angles add up, scales multiply."""
    pairs = {key: (first.tensors[key], second.tensors[key]) for key in first.tensors}
    return Interventions(
        first.config,
        {key: a + b if ".theta." in key else a * b for key, (a, b) in pairs.items()},
    )


def train(
    bench: Bench,
    model: Any,
    parameters: Any,
    rows: Sequence[Row],
    rate: float,
    seed: int,
    name: str,
) -> None:
    """Train on all rows in one shuffled stream: AdamW without decay, linear, warmup of a tenth."""
    given, parameters = bench.given, list(parameters)
    steps = max(1, given.epochs * len(rows) // given.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, round(0.1 * steps), steps)
    collate = SubspaceCollator(bench.prefixes.collate)
    source = _stream(rows, given.batch_size, seed)
    bar = tqdm(range(steps), desc=f"{name}, seed {seed}")
    for _ in bar:
        loss = answer_loss(model, collate(next(source)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}")


def _stream(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    rng, waiting = random.Random(seed), []
    while True:
        waiting += rng.sample(list(rows), len(rows))
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]


def identities(bench: Bench, model: RoadInterventionModel, rows: Sequence[Row]) -> dict[str, bool]:
    """Tell which of the exact promises hold for a trained model of two halves, bit for bit."""
    first, second = model.interventions_config.subspaces
    block = bench.model.get_decoder().layers[bench.given.layer]
    batch = {**bench.prefixes.collate(rows)}
    del batch["labels"]
    bare = {name: value for name, value in batch.items() if name != "prompt_mask"}

    def states(names: Sequence[str]) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = block.register_forward_hook(lambda *call: seen.append(_state(call[-1])))
        with torch.no_grad(), handle:
            model(**fresh(batch), subspaces=[list(names)] * len(rows))
        return seen[0]

    h, a, b, both = states([]), states([first]), states([second]), states([first, second])
    mixed = [[], [first], [], [second]] * len(rows)
    with torch.no_grad():
        base = bench.model(**fresh(bare)).logits
        some = model(**fresh(batch), subspaces=mixed[: len(rows)]).logits
    loaded = _reloaded(model)
    return {
        "both halves at once change what each changes": torch.equal(
            both, torch.where(a == h, b, a)
        ),
        "no feature is changed by both halves": not bool(((a != h) & (b != h)).any()),
        "rows without subspaces are the base model's": torch.equal(some[::2], base[::2]),
        "a subspace that a batch does not use stays": _stays(model, batch, first, second),
        "saved, isolated and composed are the same": all(
            torch.equal(value, loaded.tensors[key])
            for key, value in model.interventions().tensors.items()
        ),
    }


def fresh(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Copy what a call would change: the cache."""
    return {**batch, "past_key_values": copy.deepcopy(batch["past_key_values"])}


def _state(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _reloaded(model: RoadInterventionModel) -> Interventions:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = Interventions.load(folder)
    first, second = (loaded.isolate(name) for name in loaded.config.subspaces)
    return first.compose(second)


def _stays(model: RoadInterventionModel, batch: Any, first: str, second: str) -> bool:
    """Take a step with both subspaces and then one with the first; did the second stay?"""
    before = copy.deepcopy(model.sites.state_dict())
    optimizer = torch.optim.AdamW(model.sites.parameters(), lr=1e-2)
    count = len(batch["input_ids"])
    found: list[dict[str, torch.Tensor]] = []
    for names in ([first, second], [first]):
        model(**fresh(batch), subspaces=[names] * count).logits.float().logsumexp(
            -1
        ).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(model.interventions().tensors)
    with torch.no_grad():
        model.sites.load_state_dict(before)
    same = {key: torch.equal(value, found[1][key]) for key, value in found[0].items()}
    return all(equal == key.endswith(f".{second}") for key, equal in same.items())
