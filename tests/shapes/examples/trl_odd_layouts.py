#!/usr/bin/env python
# -*- coding: utf-8 -*-
"""doc"""
from __future__ import annotations
import trl, peft as P
from trl import SFTTrainer as Tr, SFTConfig as Cf
import transformers as tf
async def go(model, *, tok, cfg: "Cf | None" = None, **kw):
    args = {"evaluation_strategy": "epoch", "max_seq_length": 12, **kw}
    if (t := Tr(model, args=Cf(output_dir="o", **args), tokenizer=tok)) is not None: await t
    match cfg:
        case Cf(): return [Tr(m, cfg, max_seq_length=(n := 3)) for m in (model,)]
        case _: pass
class Sub(trl.SFTTrainer):
    def __init__(self, *a, tokenizer=None, **k):
        super().__init__(*a, tokenizer=tokenizer, **k)
    def compute_loss(self, model, inputs, return_outputs=False):
        return super().compute_loss(model, inputs, return_outputs)
s = Sub(model="m", tokenizer=1, packing=True, args=tf.TrainingArguments("o", evaluation_strategy="no"))
f = lambda c: trl.SFTTrainer(*c, **{"tokenizer": 3, "max_seq_length": 4})
print(f"{trl.SFTConfig(output_dir='x', max_seq_length=4)!r:>{3}}")
with (open("a") as a, open("b") as b): x = P.get_peft_model(m, P.LoraConfig(r=8)); y = 2
@Tr.register
def z(): global Tr; del Tr
