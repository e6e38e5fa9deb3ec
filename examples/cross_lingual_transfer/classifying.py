"""Classes of pairs: rows for a classifier, its predictions, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from parallel_pairs import Row
from segments import Joined, Segments, outputs, padded
from torch.nn.functional import cross_entropy

from recipes_peft import encoders

__all__ = ["Classifying", "accuracy"]


def accuracy(found: int, wanted: int) -> float:
    """Give 1 for the right class."""
    return float(found == wanted)


class Classifying:
    """How a classifier is loaded, trained and read."""

    metrics: Mapping[str, Any] = {"accuracy": accuracy}
    # A pooler is BERT's first layer of the head; many checkpoints come without a trained one.
    heads = ("classifier", "score", "pooler")

    def __init__(self, given: Any, data: Any) -> None:
        self.given, self.classes = given, data.classes
        self.tokenizer = self.load(0)[1]
        self.segments = Segments(self.tokenizer, given.max_length)

    def load(self, seed: int) -> tuple[Any, Any]:
        return encoders.load_classifier(self.given.model, self.classes, self.given.dtype, seed)

    def rows(self, rows: Sequence[Row]) -> list[tuple[Joined, int]]:
        """Give what `join` makes batches of."""
        return [(self.segments.pair(row.first, row.second), row.target) for row in rows]

    def inputs(self, rows: Sequence[Joined]) -> dict[str, torch.Tensor]:
        types = "token_type_ids" in self.tokenizer.model_input_names
        return padded(rows, self.tokenizer.pad_token_id, types)

    def join(self, rows: Sequence[tuple[Joined, int]]) -> dict[str, Any]:
        """Make a batch for training."""
        labels = torch.tensor([label for _, label in rows])
        return {**self.inputs([row for row, _ in rows]), "labels": labels}

    def predict(
        self, model: Any, rows: Sequence[Row], names: Sequence[str]
    ) -> dict[str, list[int]]:
        """Give the class of each row, by each of the adapters of these names."""
        logits = self._logits(model, self.rows(rows), names)
        return {name: found.argmax(1).tolist() for name, found in logits.items()}

    def measured(self, model: Any, rows: Sequence[Row]) -> tuple[float, float]:
        """Give the mean loss and the accuracy of the model as it is."""
        logits = self._logits(model, self.rows(rows), [""])[""]
        wanted = torch.tensor([row.target for row in rows])
        loss = cross_entropy(logits, wanted).item()
        return loss, (logits.argmax(1) == wanted).float().mean().item()

    def _logits(
        self, model: Any, rows: Sequence[tuple[Joined, int]], names: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        found = {name: torch.empty(len(rows), self.classes) for name in names}

        def take(row: int, name: str, output: Any, place: int) -> None:
            found[name][row] = output.logits[place].float().cpu()

        sequences = [row for row, _ in rows]
        outputs(model, sequences, names, self.given.test_batch_size, self.inputs, take)
        return found
