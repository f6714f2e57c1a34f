"""Every kind of layer under everything that PyTorch users do to one, against loralib and PEFT where they can do it.

A case is a module, an oracle that computes the same by the other library's code, and an input.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import loralib
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import phlora.lora as lora
from phlora.adapters.attach import attach
from phlora.adapters.peft_layer import fuse_lora, unfuse_lora
from phlora.errors import ModelError
from phlora.models.lean_layers import speed_pass
from phlora.models.tiny import tiny_phi3

# fp32 products of at most 112 terms in another order.
ROUNDING = dict(rtol=2e-4, atol=2e-5)
BLOCKS = ["q_proj", "v_proj", "up_proj", "o_proj"]


@dataclass
class Case:
    module: nn.Module
    oracle: nn.Module
    x: Tensor

    def __call__(self, module: Callable[..., Any] | None = None, x: Tensor | None = None) -> Tensor:
        return output(self.module if module is None else module, self.x if x is None else x)


def output(module: Callable[..., Any], x: Tensor) -> Tensor:
    """Models get the input behind their embedding, and return logits."""
    if isinstance(module, nn.Module) and hasattr(module, "peft_config"):
        return module(inputs_embeds=x, use_cache=False).logits
    return module(x)


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return module


def of_loralib(make: Callable[[Any], nn.Module], x: Tensor) -> Case:
    torch.manual_seed(0)
    ours, theirs = randomized(make(lora)), make(loralib)
    theirs.load_state_dict(ours.state_dict())
    return Case(ours, theirs, x)


def tiny() -> nn.Module:
    model = tiny_phi3()[0]
    # Torch's fused attention has no second derivative.
    model.set_attn_implementation("eager")
    return model


def of_peft(lean: bool = False) -> Case:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = randomized(get_peft_model(tiny(), config))
    ours = fuse_lora(copy.deepcopy(theirs))
    if lean:
        speed_pass(ours)
    return Case(ours, theirs, torch.randn(2, 5, 64))


def of_blocks(lean: bool = False, **fields: Any) -> Case:
    """The oracle is stock PEFT with the plain form of the adapter."""
    torch.manual_seed(0)
    ours = randomized(fuse_lora(attach(tiny(), {"r": 4, "target_modules": BLOCKS, **fields}).model))
    plain = copy.copy(ours.peft_config["default"])
    plain.__class__ = LoraConfig
    theirs = get_peft_model(tiny(), plain)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(ours))
    if lean:
        speed_pass(ours)
    return Case(ours, theirs, torch.randn(2, 5, 64))


def conv(module: Any) -> nn.Module:
    return module.Conv2d(4, 6, 3, r=2, lora_alpha=3)


CASES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: of_loralib(lambda m: m.Linear(12, 8, r=3, lora_alpha=5), torch.randn(4, 12)),
    "Linear fan_in_fan_out": lambda: of_loralib(
        lambda m: m.Linear(12, 8, r=3, fan_in_fan_out=True), torch.randn(4, 12)
    ),
    "MergedLinear": lambda: of_loralib(
        lambda m: m.MergedLinear(12, 9, r=2, enable_lora=[True, False, True]), torch.randn(4, 12)
    ),
    "Embedding": lambda: of_loralib(lambda m: m.Embedding(20, 8, r=3), torch.randint(20, (4, 5))),
    "Conv2d": lambda: of_loralib(conv, torch.randn(2, 4, 7, 6)),
    "PEFT": of_peft,
    "PEFT, lean": lambda: of_peft(lean=True),
    "row blocks": of_blocks,
    "row blocks, lean": lambda: of_blocks(lean=True),
    "row blocks, DoRA": lambda: of_blocks(use_dora=True),
}
each_case = pytest.mark.parametrize("name", CASES)
each_float_case = pytest.mark.parametrize("name", [name for name in CASES if name != "Embedding"])
each_layer = pytest.mark.parametrize(
    "name", [name for name in CASES if "PEFT" not in name and "row" not in name]
)
each_model = pytest.mark.parametrize("name", [name for name in CASES if "PEFT" in name or "row" in name])


@pytest.fixture
def case(name: str) -> Case:
    # LoRA alone trains, as everywhere.
    case = CASES[name]()
    for module in (case.module, case.oracle):
        for parameter_name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
    return case


def near(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, **ROUNDING)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def same_as_oracle(case: Case) -> None:
    """Output, and where there is one the gradient of the input."""
    near(case(), case(case.oracle))
    if case.x.is_floating_point():
        x = case.x.clone().requires_grad_()
        near(
            torch.autograd.grad(case(x=x).square().sum(), x),
            torch.autograd.grad(case(case.oracle, x).square().sum(), x),
        )


@each_case
def test_the_oracle_computes_the_same(case: Case) -> None:
    same_as_oracle(case)


# Derivatives.


@each_float_case
def test_second_derivatives(case: Case) -> None:
    def penalty(module: nn.Module) -> tuple[Tensor, ...]:
        x = case.x.clone().requires_grad_()
        y = case(module, x)
        # A gradient that comes in and depends on nothing, as after a sum.
        (slope,) = torch.autograd.grad(y.sum() / y.numel(), x, create_graph=True)
        return torch.autograd.grad((slope.square().sum() + y.square().mean()), [x])

    near(penalty(case.module), penalty(case.oracle))


@each_case
def test_grad_of_torch_func(case: Case) -> None:
    parameters = {name: p.detach() for name, p in trained(case.module).items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_output(case.module, parameters, case.x).square().mean()

    found = torch.func.grad(loss)(parameters)
    case().square().mean().backward()
    for name, parameter in trained(case.module).items():
        near(found[name], parameter.grad)


def functional_output(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    if hasattr(module, "peft_config"):
        inputs = {"inputs_embeds": x, "use_cache": False}
        return torch.func.functional_call(module, parameters, (), inputs).logits
    return torch.func.functional_call(module, parameters, (x,))


@each_layer
def test_vmap_over_inputs_and_over_adapters(case: Case) -> None:
    near(torch.func.vmap(case.module)(case.x[:, None]).flatten(0, 1), case())
    parameters = {name: p.detach() for name, p in trained(case.module).items()}
    many = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return functional_output(case.module, parameters, case.x)

    found = torch.func.vmap(run)(many)
    for i in range(2):
        near(found[i], run({name: p[i] for name, p in many.items()}))


@each_model
def test_gradients_of_each_row_by_vmap(case: Case) -> None:
    if not case.module.peft_config["default"].use_dora:
        parameters = {name: p.detach() for name, p in trained(case.module).items()}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_output(case.module, parameters, x[None]).square().mean()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, case.x)
        for i, x in enumerate(case.x):
            near({name: g[i] for name, g in found.items()}, torch.func.grad(loss)(parameters, x))


@each_float_case
def test_jvp_jacrev_and_jacfwd(case: Case) -> None:
    tangent = torch.randn_like(case.x)

    def scalars(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: case(module, x).square().flatten()[:3]

    for transform in (
        lambda f: torch.func.jvp(f, (case.x,), (tangent,)),
        lambda f: torch.func.jacrev(f)(case.x),
        lambda f: torch.func.vjp(f, case.x)[1](torch.ones(3)),
    ):
        near(transform(scalars(case.module)), transform(scalars(case.oracle)))


# Copies.


@each_case
@pytest.mark.parametrize("state", ["train", "eval", "merged", "unmerged"])
def test_copies_pickles_and_saved_modules_compute_for_themselves(case: Case, state: str) -> None:
    put_into(case.module, state)
    buffer = io.BytesIO()
    torch.save(case.module, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(case.module),
        pickle.loads(pickle.dumps(case.module)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        expected = case()
        for twin in copies:
            assert torch.equal(case(twin), expected) and repr(twin) == repr(case.module)
            for parameter in twin.parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(case(twin), expected)
        assert torch.equal(case(), expected)


def put_into(module: nn.Module, state: str) -> None:
    module.train(state == "train")
    if state in ("merged", "unmerged"):
        module.merge_adapter() if hasattr(module, "merge_adapter") else lora.merge(module)
    if state == "unmerged":
        module.unmerge_adapter() if hasattr(module, "unmerge_adapter") else lora.unmerge(module)


@each_case
def test_state_dicts_load_strictly_also_with_the_names_of_the_parameters(case: Case) -> None:
    fresh = copy.deepcopy(case.module)
    for parameter in trained(fresh).values():
        nn.init.zeros_(parameter)
    plain = case.module.state_dict()
    named = {name: p.detach() for name, p in case.module.named_parameters(remove_duplicate=False)}
    for state in (
        plain,
        {**named, **dict(case.module.named_buffers())} if "peft" not in repr(type(fresh)) else named,
    ):
        fresh.load_state_dict(state, strict=state is plain)
        with torch.no_grad():
            near(case(fresh), case())
            for parameter in trained(fresh).values():
                parameter.zero_()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        where = next(iter(trained(case.module))).rpartition(".")[0]
        fresh.load_state_dict({**plain, f"{where}.weight_of_nobody".lstrip("."): torch.zeros(1)})


@each_case
def test_built_on_meta_and_emptied(case: Case) -> None:
    with torch.no_grad():
        expected = case()
        state = {name: value.clone() for name, value in case.module.state_dict().items()}
        buffers = {name: value.clone() for name, value in case.module.named_buffers()}
        module = case.module.to("meta").to_empty(device="cpu")
        module.load_state_dict(state)
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
        near(case(module), expected)


@each_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = case(case.oracle.eval())
        x = case.x.to(dtype) if case.x.is_floating_point() else case.x
        y = case(case.module.eval().to(dtype), x)
    assert y.dtype in (dtype, torch.float32)
    tolerance = 1e-3 if dtype == torch.float64 else 0.05
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


# Training.


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


@each_float_case
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(case: Case, use_reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> list[Tensor]:
        x = case.x.clone().requires_grad_()
        y = checkpoint(lambda x: case(x=x), x, use_reentrant=use_reentrant) if checkpointed else case(x=x)
        y.square().mean().backward()
        found = [x.grad, *(p.grad.clone() for p in trained(case.module).values())]
        case.module.zero_grad()
        return found

    near(gradients(True), gradients(False))


@each_case
def test_autocast(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = case(), case(case.oracle)
    ours.float().square().mean().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in trained(case.module).values())
    with torch.no_grad():
        exact = case(case.oracle)
        # Both round; no further from the truth than the other, but for chance.
        assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm() + 1e-6 * exact.norm()


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
        base = case.oracle
        for parameter in trained(base).values():
            parameter.zero_() if parameter.ndim > 1 else None
        near(case(), case(base)) if "Magnitude" not in repr(case.module) else None


# What stands around a module.


def replica(module: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes one for each device: tensors of autograd in the places of the parameters."""
    made: dict[nn.Module, nn.Module] = {}
    for old in module.modules():
        made[old] = old._replicate_for_data_parallel()
        made[old]._former_parameters = {}
    for old, new in made.items():
        for name, child in old._modules.items():
            if child is not None:
                setattr(new, name, made[child])
        for name, parameter in old._parameters.items():
            if parameter is None:
                new._parameters[name] = None
            else:
                setattr(new, name, parameter.view_as(parameter))
                new._former_parameters[name] = parameter
    return made[module]


@each_case
def test_replicas_of_data_parallel(case: Case) -> None:
    y = case(replica(case.module))
    y.square().mean().backward()
    found = {name: p.grad.clone() for name, p in trained(case.module).items()}
    case.module.zero_grad()
    expected = case()
    expected.square().mean().backward()
    near(y, expected)
    near(found, {name: p.grad for name, p in trained(case.module).items()})


@each_case
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_of_accelerate(case: Case, where: str, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = case(case.oracle.eval())
        module = offloaded(case.module.eval(), where, tmp_path / "ours")
        if "Magnitude" in repr(module):
            # PEFT hands whole modules to its DoRA layer, which accelerate tries to move: stock PEFT fails alike.
            for one in (module, offloaded(case.oracle, where, tmp_path / "theirs")):
                with pytest.raises(NotImplementedError, match="meta"):
                    case(one)
            return
        near(case(module), expected)
        near(case(module), expected)


def offloaded(module: nn.Module, where: str, folder: Path) -> nn.Module:
    if where == "cpu":
        accelerate.cpu_offload(module, execution_device="cpu")
    else:
        accelerate.disk_offload(module, str(folder), execution_device="cpu")
    assert all(parameter.is_meta for parameter in module.parameters())
    return module


@each_case
def test_hooks_see_what_goes_through(case: Case) -> None:
    seen = []
    for module in case.module.modules():
        module.register_forward_hook(lambda module, args, result: seen.append(type(module)))
    same_as_oracle(case)
    assert len(seen) >= len([m for m in case.module.modules() if isinstance(m, nn.Linear | lora.LoRALayer)])


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


@each_layer
def test_compiles_in_one_piece(case: Case) -> None:
    compiled = torch.compile(case.module, fullgraph=True, backend="aot_eager")
    y = compiled(case.x)
    near(y, case())
    y.square().sum().backward()
    found = {name: p.grad.clone() for name, p in trained(case.module).items()}
    case.module.zero_grad()
    case().square().sum().backward()
    near(found, {name: p.grad for name, p in trained(case.module).items()})
    with torch.no_grad():
        near(torch.compile(case.module.eval(), backend="aot_eager")(case.x), case())


@pytest.mark.parametrize("name", ["PEFT, lean", "row blocks, lean"])
def test_a_compiled_model(case: Case) -> None:
    compiled = torch.compile(case.module, backend="aot_eager")
    x = case.x.clone().requires_grad_()
    y = compiled(inputs_embeds=x, use_cache=False).logits
    near(y, case())
    near(torch.autograd.grad(y.sum(), x), torch.autograd.grad(case(x=x).sum(), x))


@each_model
def test_slowing_down_and_speeding_up_again(case: Case) -> None:
    with torch.no_grad():
        expected = case()
        near(case(unfuse_lora(case.module)), expected)
        assert torch.equal(case(fuse_lora(case.module)), expected)


def block_up(case: Case) -> nn.Module:
    return case.module.get_submodule("base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.default")


@pytest.mark.parametrize("name", ["row blocks"])
def test_values_between_the_blocks_are_an_error_and_change_nothing(case: Case) -> None:
    up, expected = block_up(case), case()
    before = dict(up.named_parameters())
    with torch.no_grad(), pytest.raises(ModelError, match="lie outside the blocks"):
        nn.init.orthogonal_(up.weight)
    with torch.no_grad(), pytest.raises(ModelError, match="lie outside the blocks"):
        up.weight[64:70] = 1.0
    with pytest.raises(ModelError, match="cannot be exchanged"):
        up.weight = nn.Parameter(torch.zeros_like(up.weight))
    with pytest.raises(ValueError, match="read-only"):
        up.weight.detach().numpy()[...] = 1.0
    assert dict(up.named_parameters()) == before and torch.equal(case(), expected)


@pytest.mark.parametrize("name", ["row blocks"])
def test_a_weight_of_row_blocks_is_copied_and_saved_as_a_tensor(case: Case) -> None:
    weight = block_up(case).weight.detach()
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(buffer)["weight"]):
        assert type(twin) is Tensor and torch.equal(twin, weight)
        twin.zero_()
    assert block_up(case).weight.detach().any()
    block_up(case).weight.requires_grad_(False)
    assert not any(p.requires_grad for p in block_up(case).parameters())
