"""Every kind of layer under autograd, torch.func, checkpointing, autocast and torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_cases import (
    Case,
    each_case,
    each_float_case,
    each_layer,
    each_model,
    functional_output,
    near,
    same_as_oracle,
    trained,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@each_case
def test_the_oracle_computes_the_same(case: Case) -> None:
    same_as_oracle(case)


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
