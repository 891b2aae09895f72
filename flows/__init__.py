"""Flows and the command line: what happens, and in which order.

Importing any module here loads neither torch, vllm, transformers nor monarch; what needs them
imports them where it runs.
"""
