"""RoAd: adapters that rotate and scale pairs of a layer's outputs."""

__all__: list[str] = []
