"""The commands of `python -m apiq_peft`: each a module that adds its options and runs."""
