"""What stored episodes say about how training goes: figures by step (`steps`), and what in them speaks of reward
hacking or collapse (`signs`).

Everything is computed from episodes and log after the fact, so that it costs no run anything, and old runs have it.
"""
