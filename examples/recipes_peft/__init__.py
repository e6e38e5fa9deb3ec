"""What recipes share: configuration, text data, training loop and report; nothing of a method."""

__all__: list[str] = []
