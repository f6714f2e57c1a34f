"""Second derivatives of fused.py, torch.func, and compiling."""

from __future__ import annotations

import pytest
import torch
from fused_problems import make

from phlora.lora import DenseWeight, functional, fused


def seeded(function):
    def run(*inputs):
        torch.manual_seed(5)  # the mask has to be the same at every evaluation
        return function(*inputs)

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "trained", ["x bias A B", "x A B", "x", "A B", "x weight bias A B", "x weight", "x A"]
)
def test_second_derivatives_are_those_of_the_formulas(dropout, trained):
    problem = make(dtype=torch.float64, leading=(2,), K=4, sizes={"q": 3, "k": 2, "v": 2}, r={"q": 2, "v": 1})
    named = {
        "x": [problem.x],
        "weight": [problem.weight],
        "bias": [problem.bias],
        "A": [problem.A],
        "B": problem.B,
    }
    for name, tensors in named.items():
        for tensor in tensors:
            tensor.requires_grad_(name in trained.split())

    def function(x, weight, bias, A, *B):
        return fused.lora_blocks(x, weight, A, B, blocks=problem.blocks, bias=bias, dropout=dropout)

    inputs = (problem.x, problem.weight, problem.bias, problem.A, *problem.B)
    assert torch.autograd.gradgradcheck(seeded(function), inputs)


def test_second_derivatives_where_the_output_gradient_depends_on_nothing():
    """The sum of a layer's output: torch's own guard is silent here."""
    problem = make(dtype=torch.float64)

    def second(module):
        y = problem.run(module)
        (dx,) = torch.autograd.grad(y.sum(), problem.x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [problem.A, *problem.B])

    for ours, expected in zip(second(fused), second(functional), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours, expected)


def test_second_derivatives_of_mixed_dtypes_and_other_storages():
    narrow = make(dtype=torch.float32, lora_dtype=torch.float64)
    dense = DenseWeight(narrow.weight)

    def second(module, weight):
        y = narrow.run(module, weight=weight)
        grads = torch.autograd.grad(y.square().sum(), [narrow.x, narrow.A], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [narrow.x, narrow.A, *narrow.B])

    for ours, expected in zip(second(fused, dense), second(functional, narrow.weight), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_a_frozen_A_keeps_no_input_and_so_has_first_derivatives_only():
    problem = make()
    problem.A.requires_grad_(False)
    y = problem.run(fused).square().sum()
    first = torch.autograd.grad(y, [problem.x, *problem.B], create_graph=True)
    again = torch.autograd.grad(problem.run(functional).square().sum(), [problem.x, *problem.B])
    for ours, expected in zip(first, again, strict=True):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(RuntimeError, match="does not keep its input cannot be differentiated twice"):
        torch.autograd.grad(first[0].sum(), problem.B, retain_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first[1].sum().backward()


def test_a_recorded_backward_pass_gives_the_same_gradients():
    problem = make()
    leaves = [problem.x, problem.A, *problem.B]
    plain = torch.autograd.grad(problem.run(fused).square().sum(), leaves)
    recorded = torch.autograd.grad(problem.run(fused).square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(plain, recorded)


def test_second_derivatives_of_a_frozen_linear_layer():
    weight, bias = (torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bias.requires_grad_()

    def function(x, bias):
        return fused.frozen_linear(x, DenseWeight(weight), bias).sin()

    assert torch.autograd.gradgradcheck(function, (x, bias))


@pytest.mark.parametrize(
    "transform", ["grad", "vmap over x", "vmap over A and B", "jvp", "jacrev", "jacfwd", "hessian"]
)
def test_transforms_of_torch_func(transform):
    problem = make(dtype=torch.float64, leading=(3,))
    x, A, B = (problem.x.detach(), problem.A.detach(), tuple(b.detach() for b in problem.B))

    def of(module):
        def function(x, A, B):
            return module.lora_blocks(x, problem.weight, A, B, blocks=problem.blocks, bias=problem.bias)

        def scalar(x, A, B):
            return function(x, A, B).sin().sum()

        func = torch.func
        if transform == "grad":
            return func.grad(scalar, argnums=(0, 1, 2))(x, A, B)
        if transform == "vmap over x":
            return func.vmap(function, in_dims=(0, None, None))(x, A, B)
        if transform == "vmap over A and B":
            many = A.expand(2, *A.shape) * torch.tensor([1.0, 2.0])[:, None, None]
            return func.vmap(function, in_dims=(None, 0, None))(x, many, B)
        if transform == "jvp":
            return func.jvp(function, (x, A, B), (x, A, B))
        if transform == "hessian":
            return func.hessian(scalar, argnums=1)(x, A, B)
        return getattr(func, transform)(function, argnums=1)(x, A, B)

    torch.testing.assert_close(of(fused), of(functional))


def test_forward_mode_and_batched_backward():
    problem = make(dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(problem.x, torch.ones_like(problem.x))
        y = fused.lora_blocks(dual, problem.weight, problem.A, problem.B, blocks=problem.blocks)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    ones = functional.lora_blocks(
        torch.ones_like(problem.x), problem.weight, problem.A, problem.B, blocks=problem.blocks
    )
    torch.testing.assert_close(tangent, ones)
    for vectorize in (False, True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: fused.lora_blocks(x, problem.weight, problem.A, problem.B, blocks=problem.blocks),
            problem.x.detach(),
            vectorize=vectorize,
        )
        assert jacobian.shape == (*ones.shape, *problem.x.shape)
        torch.testing.assert_close(jacobian.sum((3, 4, 5)), ones)


def test_a_weight_overwritten_before_backward_is_noticed():
    problem = make()
    y = problem.run(fused)
    with torch.no_grad():
        problem.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_compiles_without_a_graph_break():
    problem = make()
    compiled = torch.compile(problem.run, backend="aot_eager", fullgraph=True)
    y = compiled(fused)
    torch.testing.assert_close(y, problem.run(functional))
    y.sum().backward()
    assert problem.A.grad is not None
