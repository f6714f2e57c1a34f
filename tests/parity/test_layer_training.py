"""Every kind of layer under optimizers, averages, initialisations, freezing and hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import (
    Case,
    each_case,
    near,
    same_as_oracle,
    trained,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import phlora.lora as lora


def losses(case: Case, module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = case(module).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found


@each_case
@pytest.mark.parametrize("how", ["fused", "foreach"])
def test_optimizers_that_write_many_parameters_at_once(case: Case, how: str) -> None:
    twin = copy.deepcopy(case.module)
    found = []
    for module, settings in ((case.module, {how: True}), (twin, {"foreach": False})):
        module.eval()
        with torch.no_grad():
            case(module)
        optimizer = torch.optim.AdamW(trained(module).values(), lr=1e-2, **settings)
        found.append(losses(case, module, optimizer))
        with torch.no_grad():
            found[-1].append(case(module))
    near(*found)
    assert not torch.equal(found[0][0], found[0][1])


@each_case
def test_averages_of_the_weights(case: Case) -> None:
    average = AveragedModel(case.module, avg_fn=lambda old, new, count: 0.5 * old + 0.5 * new)
    with torch.no_grad():
        before = {name: p.clone() for name, p in trained(case.module).items()}
        average.update_parameters(case.module)
        for parameter in trained(case.module).values():
            parameter.mul_(3)
        average.update_parameters(case.module)
        # The swap that EMA packages make for an evaluation, and back.
        case.module.eval()
        case()
        kept = {name: p.data for name, p in trained(case.module).items()}
        for name, parameter in trained(case.module).items():
            parameter.data = 2 * before[name]
        near(case(), case(average.module.eval()))
        for name, parameter in trained(case.module).items():
            parameter.data = kept[name]
        for parameter in trained(average.module).values():
            parameter.mul_(1.5)
        near(case(), case(average.module))


@each_case
def test_initialisation_of_any_lora_weight_by_its_name(case: Case) -> None:
    """As a script does that walks modules: `layer.lora_B.default.weight` for PEFT's, `layer.lora_B` for loralib's."""
    weights = {
        (name, attribute): lambda m=module, a=attribute: getattr(m, a)
        for name, module in case.module.named_modules()
        for attribute in ("weight", "lora_A", "lora_B")
        if isinstance(getattr(module, attribute, None), Tensor)
        and "lora_" in f"{name}.{attribute}"
        and "magnitude" not in name
    }
    assert weights
    for initialise in (
        lambda w: nn.init.normal_(w, std=0.2),
        lambda w: nn.init.uniform_(w, 0.1, 0.2),
        lambda w: nn.init.constant_(w, 0.125),
        lambda w: nn.init.kaiming_uniform_(w),
        nn.init.xavier_normal_,
        nn.init.ones_,
        lambda w: nn.init.trunc_normal_(w, std=0.1),
        lambda w: w.data.normal_(std=0.1),
        lambda w: w.detach().mul_(1.5),
        lambda w: w.data.view(-1).mul_(2),
        nn.init.zeros_,
    ):
        names = set(dict(case.module.named_parameters()))
        for weight in weights.values():
            before = weight().detach().clone()
            with torch.no_grad():
                initialise(weight())
            assert not torch.equal(weight().detach(), before)
        assert set(dict(case.module.named_parameters())) == names
    with torch.no_grad():
        for parameter in trained(case.oracle).values():
            # Not the magnitudes of DoRA, which are vectors.
            if parameter.ndim > 1:
                parameter.zero_()
        near(case(), case(case.oracle))


@each_case
def test_freezing_and_thawing(case: Case) -> None:
    for frozen in ("lora_A", "lora_B"):
        for name, parameter in case.module.named_parameters():
            parameter.requires_grad_("lora_" in name and frozen not in name)
        case.module.zero_grad()
        case().square().mean().backward()
        for name, parameter in case.module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


@each_case
def test_weights_that_train_beside_a_frozen_adapter(case: Case) -> None:
    for module in (case.module, case.oracle):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" not in name)
        module.eval()
        case(module).square().mean().backward()

    def weights(module: nn.Module) -> list[Tensor]:
        return [parameter for name, parameter in module.named_parameters() if "lora_" not in name]

    for ours, theirs in zip(weights(case.module), weights(case.oracle), strict=True):
        if theirs.grad is not None:
            near(ours.grad, theirs.grad)


@each_case
def test_hooks_see_what_goes_through(case: Case) -> None:
    seen = []
    for module in case.module.modules():
        module.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    same_as_oracle(case)
    assert len(seen) >= len([m for m in case.module.modules() if isinstance(m, nn.Linear | lora.LoRALayer)])
