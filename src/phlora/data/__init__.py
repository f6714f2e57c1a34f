"""Chat files in, token rows out: reading, checking, tokenising, packing and collating.

    rows.py, problems.py  Row, where it stands (Origin), its digests; what was found (Problem), how it is shown
    readers/              files, folders and hub data sets -> records, with the line that each came from
    split_names.py        which split the name of a file or the value of a column speaks of
    json_text.py          JSON in a text, read strictly
    values.py             one look at every value of a record, and the renaming of columns
    formats.py            records of every common schema -> Row
    messages.py, blocks.py, dialects.py   messages and chats of every provider in one form
    exports.py, convert.py                exports that leave a choice to the user; plain JSONL of whatever is read
    advice.py             what to do about rows of no known schema
    dataset.py            all rows of several sources: loaded, or indexed and read again
    known_keys.py         every known column and message key of other tools, and what is done with it
    spelling.py, heeding.py               their one spelling, and doing with them what that table says
    columns.py, contexts.py, preferences.py, reasoning.py   what the table needs of them
    similarity.py         digests by which rows are the same conversation, or nearly the same
    split.py, leaks.py    which conversations are held out, and what training sees of them
    inspection.py         both sides of the data and what is odd about them
    system_prompt.py      the system prompt that most rows have
    tools_text.py         tools, calls and results as text, and back
    chat_template.py      what a chat template does to each message; where its text stands in the rendering
    tool_probes.py        the chats that show what of tools a template writes
    rendering.py          a rendered chat: its text, and the spans of its messages
    template_messages.py  what of the messages decides how a template renders them
    template_analysis.py  what the syntax of a template proves about it
    encoding.py           text -> ids and character offsets
    turn_positions.py     where turns stand among tokens, without offsets
    labels.py             which tokens are trained, and with what weight
    tokenize_notes.py     what a person should know of tokenised rows, by kind
    row_tokenizer.py      batches of rows -> ids and labels: rendered, encoded, shortened where too long
    tokenize.py           Row -> input_ids, labels and weights; what was dropped or cut, and why
    prompts.py            Row -> what is asked of a model
    table.py              token rows as flat arrays
    cache.py              token rows kept between runs
    packing.py            which rows share one sequence
    prefixes.py           which rows share the computation of their first tokens
    collate.py            rows -> tensors
    lengths.py            how long rows are, and what a limit keeps
    checks.py             everything wrong with a file, in one pass

The tokenizer is always passed in: this package imports neither transformers nor peft.
"""
