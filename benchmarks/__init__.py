"""Benchmarks, and proofs of what takes longer than a test may."""
