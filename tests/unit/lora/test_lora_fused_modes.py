"""fused.py under dropout, gradient checkpointing, autocast, and graphs that use it twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused_problems import assert_close, kept_tensors, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phlora.lora import functional, fused, row_blocks


def dropped_out_inputs(p: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Identity adapter on 40,000 ones: the output is the dropped-out input itself."""
    x, eye = torch.ones(10_000, 4, dtype=dtype), torch.eye(4, dtype=dtype)
    with torch.no_grad():
        whole = row_blocks({"w": 4}, ["w"], r=4, scaling=1.0)
        return fused.lora_blocks(x, torch.zeros_like(eye), eye, [eye], blocks=whole, dropout=p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_keeps_and_scales_as_torch_does(p, dtype):
    torch.manual_seed(0)
    y = dropped_out_inputs(p, dtype)
    kept = y != 0
    # Four standard deviations of a share of 40,000 draws.
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / y.numel()) ** 0.5
    # The share kept is a multiple of 2⁻¹⁶, and the scale is that of this share, so that the mean has no bias.
    share = round((1 - p) * 65536) / 65536
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / share))
    by_column = kept.float().mean(0)
    assert (by_column - (1 - p)).abs().max() < 5 * (p * (1 - p) / len(y)) ** 0.5


def test_masks_follow_the_global_seed_and_differ_between_calls():
    torch.manual_seed(1)
    first, second = dropped_out_inputs(0.5), dropped_out_inputs(0.5)
    torch.manual_seed(1)
    assert torch.equal(dropped_out_inputs(0.5), first)
    assert not torch.equal(first, second)


def test_without_dropout_the_random_state_is_untouched():
    before = torch.get_rng_state()
    make().gradients(fused)
    assert torch.equal(torch.get_rng_state(), before)


def test_backward_uses_the_mask_of_its_own_forward():
    problem = make({"w": 8}, ["w"], leading=(30,), K=20, r=2)
    torch.manual_seed(0)
    y1 = problem.run(fused, dropout=0.5)
    y2 = problem.run(fused, dropout=0.5)
    for y in (y2, y1):
        gradient = torch.randn(y.shape)
        (dx,) = torch.autograd.grad(y, problem.x, gradient)
        through_adapter = dx - gradient @ problem.weight
        # y is linear in x: the adapter's part of y, dotted with the gradient, must equal x · dx of that part.
        part = y.detach() - F.linear(problem.x, problem.weight, problem.bias).detach()
        left, right = (part * gradient).sum(), (problem.x.detach() * through_adapter).sum()
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing(use_reentrant, dropout):
    problem = make()

    def step(run):
        for leaf in problem.leaves():
            leaf.grad = None
        torch.manual_seed(7)
        y = run()
        (y**2).sum().backward()
        return [y.detach(), problem.x.grad, problem.A.grad, *(B.grad for B in problem.B)]

    def run(x):
        return fused.lora_blocks(
            x.tanh(), problem.weight, problem.A, problem.B, blocks=problem.blocks, dropout=dropout
        )

    plain = step(lambda: run(problem.x))
    recomputed = step(lambda: checkpoint(run, problem.x, use_reentrant=use_reentrant))
    for a, b in zip(recomputed, plain, strict=True):
        assert torch.equal(a, b)


def test_a_recomputation_with_another_mask_is_consistent_in_itself():
    problem = make()

    def run(x):
        return fused.lora_blocks(x, problem.weight, problem.A, problem.B, blocks=problem.blocks, dropout=0.5)

    leaves = [problem.x, problem.A, *problem.B]
    torch.manual_seed(1)
    y = checkpoint(run, problem.x, use_reentrant=False, preserve_rng_state=False)
    torch.manual_seed(2)
    recomputed = torch.autograd.grad(y.sum(), leaves)
    torch.manual_seed(2)
    plain = torch.autograd.grad(run(problem.x).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, plain, strict=True))


def test_activations_can_be_moved_away_and_back():
    problem = make()
    expected = problem.gradients(fused)
    for leaf in problem.leaves():
        leaf.grad = None
    with torch.autograd.graph.save_on_cpu():
        y = problem.run(fused)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    assert torch.equal(problem.A.grad, expected[4]) and torch.equal(problem.x.grad, expected[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters_own(dropout):
    problem = make(leading=(12,))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = problem.gradients(fused, dropout=dropout)
    assert ours[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in ours[1:] if g is not None)
    if not dropout:
        with torch.autocast("cpu", torch.bfloat16):
            reference = problem.gradients(functional)
        assert_close(ours, reference, dtype=torch.bfloat16)


def test_autocast_keeps_the_input_in_its_own_dtype():
    problem = make({"w": 96}, ["w"], leading=(50,), K=64, r=4)
    with torch.autocast("cpu", torch.bfloat16):
        _, kept = kept_tensors(lambda: problem.run(fused))
    assert [t.dtype for t in kept if t.shape == (50, 64)] == [torch.bfloat16]


def test_autocast_leaves_fp64_alone():
    problem = make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert problem.run(fused).dtype == torch.float64


@pytest.mark.parametrize("inside", ["forward only", "backward only"])
def test_forward_and_backward_may_differ_in_autocast(inside):
    problem = make(leading=(12,))
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "forward only"):
        y = problem.run(fused)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "backward only"):
        y.sum().backward()
    assert problem.A.grad.dtype == torch.float32
    expected = torch.autograd.grad(problem.run(functional).sum(), problem.A)[0]
    dtype = torch.bfloat16 if inside == "forward only" else torch.float32
    assert_close([problem.A.grad], [expected], dtype=dtype)


def test_one_layer_used_twice_in_a_graph():
    problem = make({"w": 9}, ["w"], K=9, r=2)

    def twice(module):
        def call(x):
            return module.lora_blocks(x, problem.weight, problem.A, problem.B, blocks=problem.blocks)

        problem.A.grad = problem.B[0].grad = problem.x.grad = None
        call(call(problem.x).tanh()).square().sum().backward()
        return [problem.x.grad, problem.A.grad, problem.B[0].grad]

    assert_close(twice(fused), twice(functional), dtype=torch.float32)


def test_backward_twice_through_a_kept_graph():
    problem = make()
    y = problem.run(fused, dropout=0.2)
    first = torch.autograd.grad(y.sum(), [problem.x, problem.A], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [problem.x, problem.A])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_inplace_activation_may_follow():
    problem = make()

    def step(module):
        y = problem.run(module)
        gradients = torch.autograd.grad(F.relu_(y).sum(), [problem.x, problem.A])
        return [y.detach(), *gradients]

    assert_close(step(fused), step(functional), dtype=torch.float32)
