"""Configurations of other training tools -> one of Phlora's, with a word on every setting.

recognise.py     which tool a file is of
settings.py      the settings of a file, taken out one by one, and what was decided about each
shared.py        what the tools have in common: optimizers, schedules, targets, held-out rows
llamafactory.py  axolotl.py  torchtune.py  unsloth.py: one tool each
axolotl_rows.py  the data sets of Axolotl
steps.py         steps of an epoch, counted where the rows are at hand
written.py       the configuration as YAML, with the decisions as comments
story.py         `import_config`: all of it
"""
