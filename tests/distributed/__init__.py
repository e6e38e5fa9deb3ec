"""Both tuners on two processes that talk over gloo, one file an engine.

These tests stand beside the mirror of the packages: an engine (DDP, FSDP2, tensor parallelism) is
not a module of ours, and each runs RoAd and ApiQ alike. A file starts its two processes once; they
write what they saw into files, and the tests compare these with one process.
"""
