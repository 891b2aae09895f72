"""Supervised examples: read from files, made into token ids and a mask, split, and shuffled.

files       JSONL, Parquet and Arrow files, or a Hugging Face dataset folder of them, as rows
examples    what a row has to be: messages, or a prompt and its completion
encoding    token ids, and which of them the assistant wrote
split       train and validation by hash
order       which examples make the batch of a step
training    steps, validation, early stop, and the best weights
"""
