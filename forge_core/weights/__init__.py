"""Weights from the trainer to the generators: packing, TorchStore, and vLLM's side of the transfer.

Invariant: a generator serves version v only after the digest of the bytes it received equals the trainer's.
"""
