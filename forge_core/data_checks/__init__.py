"""Checks of a dataset before anything expensive starts: what would ruin a run, and what is worth a look.

rows        the rows of files and folders, with every line that is none
columns     what each row asks and answers, and rows that lack it
duplicates  the same prompt again: within a split, across splits, with another answer, nearly
minhash     which prompts are worth comparing
balance     answers of one kind only, and lengths
tokens      lengths in tokens against the context, unknown and special tokens
report      all of them over one dataset
"""
