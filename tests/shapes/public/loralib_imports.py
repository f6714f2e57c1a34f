import torch
import loralib.layers
import loralib.utils as utils
from loralib import Embedding, Linear
from loralib.layers import LoRALayer

model = torch.nn.Sequential(
    Embedding(10, 8, r=2),
    Linear(8, 8, r=2),
    loralib.layers.Linear(8, 4, r=2),
)
utils.mark_only_lora_as_trainable(model)
print([isinstance(part, LoRALayer) for part in model], list(loralib.lora_state_dict(model)))
