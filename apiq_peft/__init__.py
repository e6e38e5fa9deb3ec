"""ApiQ: quantise a model to 4, 3 or 2 bits and initialise its LoRA factors at the same time.

Holds no tuner yet; nothing is exported.
"""

__all__: list[str] = []
