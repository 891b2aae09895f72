"""Which processes of a run lie where: hosts, their GPUs, cores and memory, and who holds what of them.

Importing it loads neither torch nor monarch, so that a plan can be made, or refused, before anything is started.
"""
