import loralib as lora
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        # q and v alone, in one weight
        self.qkv = lora.MergedLinear(width, 3 * width, r=4, enable_lora=[True, False, True])
        self.out = lora.Linear(width, width, r=4, lora_alpha=8, merge_weights=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


model = Attention()
lora.mark_only_lora_as_trainable(model, bias="lora_only")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    loss = model(torch.randn(2, 5, 16)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(lora.lora_state_dict(model, bias="lora_only"), "lora.pt")
model.load_state_dict(torch.load("lora.pt"), strict=False)
