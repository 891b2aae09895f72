"""Replay buffers: which groups are kept, trained on again, and given up, and why. Pure Python, without clocks or IO.

    mixture       the buffer of a run: sources, their shares of a batch, uses, and the order of a step
    source        what all sources are: the groups that are held, and who leaves when room is needed
    fifo          the newest groups, drawn evenly
    prioritised   the newest groups, drawn by priority, with importance weights
    reservoir     an even sample of all groups there ever were, drawn evenly
    sum_tree      drawing by priority in logarithmic time
    chance        random numbers that follow from a seed and a place alone

Everything here follows from a seed and from what is admitted and used: no state has to be kept beside the log.
"""
