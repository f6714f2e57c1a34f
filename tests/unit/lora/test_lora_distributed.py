"""The layers under DDP and FSDP2: a world of one process, gloo, CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import phlora.lora as lora

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        lora.Linear(8, 8, r=2, lora_dropout=0.2),
        nn.ReLU(),
        lora.MergedLinear(8, 12, r=2, enable_lora=[True, False, True]),
    )
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.lora_B)
    lora.mark_only_lora_as_trainable(layers)
    return layers


def gradients(wrapped: nn.Module, layers: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    wrapped(torch.ones(2, 5, 8)).square().sum().backward()
    found = [p.grad for p in layers.parameters() if p.requires_grad]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in found]


def test_ddp(process_group):
    plain, replicated = model(), model()
    expected = gradients(plain, plain)
    torch.testing.assert_close(gradients(DistributedDataParallel(replicated), replicated), expected)


def test_fsdp2(process_group):
    plain, sharded = model(), model()
    mesh = init_device_mesh("cpu", (1,))
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    torch.testing.assert_close(gradients(sharded, sharded), gradients(plain, plain))
    with torch.no_grad():
        torch.testing.assert_close(sharded.eval()(torch.ones(2, 8)), plain.eval()(torch.ones(2, 8)))
    assert sharded[0].merged
