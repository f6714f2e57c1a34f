"""Chat files in, token rows out: reading, checking, tokenising, packing and collating.

    rows.py       Row, where it stands (Origin), what was found (Problem), and the digests of rows
    readers.py    files, folders and hub data sets -> records, with the line that each came from
    formats.py    records of every common schema -> Row
    dataset.py    all rows of several sources: loaded, or indexed and read again
    split.py      which rows are held out
    chat_template.py      what a chat template does to each message; where its text stands in the rendering
    template_analysis.py  what the syntax of a template proves about it
    encoding.py           text -> ids and character offsets
    turn_positions.py     where turns stand among tokens, without offsets
    labels.py             which tokens are trained, and with what weight
    tokenize.py           Row -> input_ids, labels and weights; what was dropped or cut, and why
    prompts.py            Row -> what is asked of a model
    table.py              token rows as flat arrays
    cache.py      token rows kept between runs
    packing.py    which rows share one sequence
    collate.py    rows -> tensors
    checks.py     everything wrong with a file, in one pass

The tokenizer is always passed in: this package imports neither transformers nor peft.
"""
