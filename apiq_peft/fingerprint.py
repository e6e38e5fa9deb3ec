"""Short fingerprints: of samples and weights, and of the codes that an adapter belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from apiq_peft.packed import PackedLinear


def digest(tensor: Tensor) -> str:
    """Give a short fingerprint of a tensor's bytes."""
    held = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(held.tobytes(), digest_size=16).hexdigest()


def codes_digest(layer: PackedLinear) -> str | None:
    """Give a fingerprint of all zero points and the first codes of every output.

    None if they are not at hand: without values, or in parts on several processes.
    """
    held = (layer.qzeros, layer.qweight)
    if any(t.is_meta or not t.numel() or isinstance(t, DTensor) for t in held):
        return None
    return digest(torch.cat([layer.qzeros.detach().flatten(), layer.qweight.detach()[0]]))


def fingerprint(digests: Mapping[str, str | None]) -> str | None:
    """Join the digests of some layers, by name; None if there is none, or one is not known."""
    if not digests or None in digests.values():
        return None
    text = json.dumps(dict(digests), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
