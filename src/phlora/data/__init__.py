"""Chat files in, token rows out: reading, checking, tokenising, packing and collating.

    formats.py    every accepted file and schema -> Row, with the line that each row came from
    template.py   what a chat template does to each message; where its text stands in the rendering
    tokenize.py   Row -> input_ids, labels and weights; what was dropped or cut, and why
    packing.py    which rows share one sequence
    collate.py    rows -> tensors
    checks.py     everything wrong with a file, in one pass

The tokenizer is always passed in: this package imports neither transformers nor peft.
"""
