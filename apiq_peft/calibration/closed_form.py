"""A and B of a layer in closed form: the best correction of a given rank, by a weighted SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from apiq_peft.calibration.finite import all_finite
from apiq_peft.calibration.processes import Processes

_Factors = tuple[Tensor, Tensor]


class Moments:
    """Sums over tokens from which the corrections of layers with one input follow.

    For inputs x of the full-precision model and z of the quantised one: the second moment of z, and
    for every layer the product of z with the error that its correction has to undo, x W^T - z Q^T.

    Shapes:
        x, z: (tokens, K). W, Q: (N, K).
    """

    def __init__(self, inputs: int, outputs: dict[str, int], device: torch.device) -> None:
        self.second = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = {
            name: torch.zeros(inputs, N, dtype=torch.float64, device=device)
            for name, N in outputs.items()
        }
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, z: Tensor, errors: dict[str, Tensor], real: Tensor | None = None) -> None:
        """Take in some tokens: z (..., K) and what is missing at each output (..., N).

        `real` (...) is 0 for the rows that do not count, 1 for the others.
        """
        z = z.flatten(0, -2).float()
        counted = z if real is None else z * real.reshape(-1, 1)
        self.second += counted.t() @ z
        for name, error in errors.items():
            self.cross[name] += counted.t() @ error.flatten(0, -2).float()
        self.tokens += len(z) if real is None else real.sum()

    def join(self, processes: Processes) -> None:
        """Add the sums of all processes."""
        processes.add((self.second, self.tokens, *self.cross.values()))

    def not_finite(self) -> str | None:
        """Give the name of the first layer of whose sums some are not finite, None if all are."""
        for name, cross in self.cross.items():
            if not all_finite((self.second, cross)):
                return name
        return None

    def solve(self, rank: int | dict[str, int], damping: float = 1e-2) -> dict[str, _Factors]:
        """Give A (rank, K) and B (N, rank) of each layer, float32, that leave the least error.

        The regression of the error on z is D = H^-1 C with H the second moment of z and C the cross
        moment; among all of rank r the best is the truncated SVD of H^(1/2) D, with H^(1/2) taken
        out again. `damping` times the mean of H's diagonal is added to it.

        Source:
            EoRA (arXiv:2410.21271) and CLoQ (arXiv:2501.18475), here for inputs of the quantised
            model.
        """
        tokens = self.tokens.clamp(min=1)
        H = self.second / tokens
        mean = H.diagonal().mean().clamp(min=1e-12)
        H.diagonal().add_(damping * mean)
        values, vectors = torch.linalg.eigh(H)
        inverse_root = vectors / values.clamp(min=values.max() * 1e-10).sqrt()
        ranks = rank if isinstance(rank, dict) else dict.fromkeys(self.cross, rank)
        factors = {}
        for name, cross in self.cross.items():
            whitened = inverse_root.t() @ (cross / tokens)  # H^(1/2) D, turned
            left, right = _low_rank(whitened, ranks[name])
            factors[name] = ((inverse_root @ left).t().float(), right.t().float())
        return factors


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Give the best (m, r) times (r, n) of a matrix (m, n), the singular values shared evenly."""
    m, n = matrix.shape
    gram = matrix.t() @ matrix if n <= m else matrix @ matrix.t()
    values, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -rank:].flip(1)
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()  # else up to rounding
    # of the singular values; one that is 0 up to rounding may come out negative, and divides
    least = (values[-1] * torch.finfo(values.dtype).eps).clamp(min=torch.finfo(values.dtype).tiny)
    roots = values[-rank:].flip(0).clamp(min=least) ** 0.25
    if n <= m:
        right = top.t() * roots[:, None]
        return matrix @ top / roots, right
    left = top * roots
    return left, top.t() @ matrix / roots[:, None]
