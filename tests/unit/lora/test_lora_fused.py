"""fused.py against functional.py: values, gradients, and what is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fused_problems import assert_close, kept_tensors, make
from torch import Tensor

from phlora.lora import functional, fused

CASES = {
    "two of three unequal blocks": {},
    "one block": {"sizes": {"w": 11}, "enabled": ["w"], "r": 3},
    "all blocks": {"enabled": ["q", "k", "v"]},
    "only the middle": {"enabled": ["k"]},
    "no bias": {"bias": False},
    "one vector": {"leading": ()},
    "one token": {"leading": (1,)},
    "no tokens": {"leading": (0,)},
    "many dimensions": {"leading": (2, 1, 3, 2)},
    "rank one": {"r": 1},
    "odd sizes": {"sizes": {"q": 40, "k": 10, "v": 10}, "K": 31, "leading": (17,)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients_equal_the_reference(case, dtype):
    problem = make(**case, dtype=dtype)
    assert_close(problem.gradients(fused), problem.gradients(functional), dtype=dtype)


def test_every_leaf_that_wants_a_gradient_gets_the_reference_one():
    problem = make()
    problem.weight.requires_grad_()
    problem.bias.requires_grad_()
    ours = problem.gradients(fused)
    assert all(gradient is not None for gradient in ours)
    assert_close(ours, problem.gradients(functional), dtype=torch.float32)


@pytest.mark.parametrize("frozen", ["x", "A", "B", "one of B"])
def test_leaves_that_want_no_gradient_get_none(frozen):
    problem = make()
    chosen = {"x": [problem.x], "A": [problem.A], "B": problem.B, "one of B": problem.B[:1]}[frozen]
    for leaf in chosen:
        leaf.requires_grad_(False)
    ours = problem.gradients(fused)
    assert all(leaf.grad is None for leaf in chosen)
    assert_close(ours, problem.gradients(functional), dtype=torch.float32)


def test_strided_inputs_and_weights():
    problem = make(leading=(6,), K=9)
    wide = torch.randn(9, 6)
    problem.x = wide.t().detach().requires_grad_()
    problem.weight = torch.randn(9, 15).t()
    assert not problem.x.is_contiguous() and not problem.weight.is_contiguous()
    assert_close(problem.gradients(fused), problem.gradients(functional), dtype=torch.float32)


def test_expanded_output_gradient():
    problem = make()
    problem.run(fused).sum().backward()
    ours = problem.A.grad.clone()
    problem.A.grad = None
    problem.run(functional).sum().backward()
    torch.testing.assert_close(ours, problem.A.grad)


@pytest.mark.parametrize("module", [functional, fused], ids=["functional", "fused"])
def test_one_block_of_all_rows_is_plain_lora(module):
    problem = make({"w": 11}, ["w"], r=3)
    expected = F.linear(problem.x, problem.weight, problem.bias)
    expected = expected + 0.3 * problem.x @ problem.A.t() @ problem.B[0].t()
    torch.testing.assert_close(problem.run(module), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("need_x", [True, False])
def test_gradcheck(dropout, need_x):
    problem = make(dtype=torch.float64)
    problem.x.requires_grad_(need_x)

    def function(x, bias, A, *B):
        torch.manual_seed(5)  # the mask has to be the same at every evaluation
        return fused.lora_blocks(x, problem.weight, A, B, blocks=problem.blocks, bias=bias, dropout=dropout)

    bias = problem.bias.requires_grad_()
    assert torch.autograd.gradcheck(function, (problem.x, bias, problem.A, *problem.B))


@pytest.mark.parametrize("cached", [1, 100, 300, 1 << 19], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_wider_adapter_computed_a_few_rows_at_a_time_is_the_same(cached, dropout, monkeypatch):
    def results():
        torch.manual_seed(3)
        options = {"sizes": {"q": 24, "v": 16}, "enabled": ["q", "v"], "r": 4, "leading": (5, 7)}
        problem = make(**options, dtype=torch.bfloat16, lora_dtype=torch.float32)
        return problem.gradients(fused, dropout=dropout)

    whole = results()
    monkeypatch.setattr(fused, "_CACHED", cached)
    for part, all_at_once in zip(results(), whole, strict=True):
        if all_at_once is not None:
            tight = all_at_once.dtype == torch.float32
            torch.testing.assert_close(part, all_at_once, rtol=1e-5 if tight else 1e-2, atol=1e-5)


def test_no_rows_at_all_in_16_bits():
    problem = make(leading=(0,), dtype=torch.bfloat16, lora_dtype=torch.float32)
    results = problem.gradients(fused)
    assert results[0].shape[0] == 0 and not problem.A.grad.any()


@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_is_no_further_from_fp64_than_the_reference(lora_dtype):
    def errors(module):
        total = torch.zeros(5)
        for seed in range(8):
            sizes = {"q": 48, "v": 32}
            options = {"sizes": sizes, "enabled": ["q", "v"], "r": 8, "leading": (40,), "K": 64, "seed": seed}
            low = make(**options, dtype=torch.bfloat16, lora_dtype=lora_dtype)
            exact = make(**options, dtype=torch.float64)
            for ours, same in zip(exact.leaves(), low.leaves(), strict=True):
                ours.data = same.detach().double()
            got, want = low.gradients(module), exact.gradients(functional)
            pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None]
            total += torch.stack([((a.double() - b).norm() / b.norm()).float() for a, b in pairs])
        return total / 8

    ours, reference = errors(fused), errors(functional)
    # A hundredth is left for chance: where both round alike, the two errors differ in the third digit.
    assert (ours <= 1.01 * reference).all(), (ours, reference)
    if lora_dtype == torch.bfloat16:
        assert ours[0] < 0.95 * reference[0]


def test_mixed_dtypes_keep_the_dtype_of_each_parameter():
    problem = make(dtype=torch.bfloat16, lora_dtype=torch.float32)
    ours = problem.gradients(fused)
    assert ours[0].dtype == torch.bfloat16 and problem.x.grad.dtype == torch.bfloat16
    assert problem.A.grad.dtype == torch.float32 and problem.B[0].grad.dtype == torch.float32
    assert_close(ours, problem.gradients(functional), dtype=torch.bfloat16)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keeps_only_x_and_x_A(dropout):
    T, K, r = 50, 64, 4
    problem = make({"q": 96, "k": 32, "v": 32}, ("q", "v"), leading=(T,), K=K, r=r)
    _, kept = kept_tensors(lambda: problem.run(fused, dropout=dropout))
    own = {leaf.data_ptr() for leaf in (problem.weight, problem.bias, problem.A, *problem.B)}
    activations = [t for t in kept if t.data_ptr() not in own]
    shapes = sorted(tuple(t.shape) for t in activations)
    assert shapes == ([()] if dropout else []) + [(T, 2 * r), (T, K)]
    assert problem.x.data_ptr() in {t.data_ptr() for t in activations}


def test_keeps_nothing_large_when_A_is_frozen():
    problem = make({"w": 96}, ["w"], leading=(50,), K=64, r=4)
    problem.A.requires_grad_(False)
    _, kept = kept_tensors(lambda: problem.run(fused))
    assert problem.x.data_ptr() not in {t.data_ptr() for t in kept}


def test_the_reference_keeps_more():
    problem = make({"q": 96, "k": 32, "v": 32}, ("q", "v"), leading=(50,), K=64, r=4)

    def size(module):
        _, kept = kept_tensors(lambda: problem.run(module, dropout=0.1))
        own = {leaf.data_ptr() for leaf in (problem.weight, problem.bias, problem.A, *problem.B)}
        return sum(t.nbytes for t in kept if t.data_ptr() not in own)

    assert size(fused) < 0.6 * size(functional)


class EighthSteps:
    """A toy quantised storage: int8 in steps of 1/8, with a count of its uses."""

    def __init__(self, weight: Tensor):
        self.codes = (weight * 8).round().clamp(-127, 127).to(torch.int8)
        self.uses = {"matmul": 0, "matmul_t": 0}

    def dense(self, dtype):
        return self.codes.to(dtype) / 8

    def matmul(self, x, bias=None):
        self.uses["matmul"] += 1
        return F.linear(x, self.dense(x.dtype), bias)

    def matmul_t(self, dy):
        self.uses["matmul_t"] += 1
        return dy @ self.dense(dy.dtype)


def test_another_storage_needs_only_the_two_operations():
    problem = make()
    operand = EighthSteps(problem.weight)
    problem.weight = operand.dense(torch.float32)
    ours = problem.gradients(fused, weight=operand)
    assert operand.uses == {"matmul": 1, "matmul_t": 1}
    assert_close(ours, problem.gradients(functional), dtype=torch.float32)
    assert_close(problem.gradients(functional, weight=operand), ours, dtype=torch.float32)


def test_no_input_gradient_is_computed_for_an_input_that_needs_none():
    problem = make()
    problem.x.requires_grad_(False)
    operand = EighthSteps(problem.weight)
    problem.gradients(fused, weight=operand)
    assert operand.uses == {"matmul": 1, "matmul_t": 0}


def test_delta_weight_is_zero_outside_the_enabled_rows():
    problem = make({"q": 40, "k": 10, "v": 10}, ("q", "v"))
    with torch.no_grad():
        delta = functional.delta_weight(problem.A, problem.B, blocks=problem.blocks, out_features=60)
        assert delta[:40].abs().min() > 0 and delta[50:].abs().min() > 0
        assert not delta[40:50].any()
        for module in (functional, fused):
            zero = torch.zeros_like(problem.weight)
            y = module.lora_blocks(problem.x, zero, problem.A, problem.B, blocks=problem.blocks)
            torch.testing.assert_close(F.linear(problem.x, delta), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weight_is_the_exact_sum_rounded_once(dtype):
    problem = make(dtype=dtype)
    exact = make(dtype=torch.float64)
    for wide, same in zip(exact.leaves(), problem.leaves(), strict=True):
        wide.data = same.detach().double()
    want = functional.merged_weight(exact.weight, exact.A, exact.B, blocks=exact.blocks).to(dtype)
    for module in (functional, fused):
        before = problem.weight.clone()
        got = module.merged_weight(problem.weight, problem.A, problem.B, blocks=problem.blocks)
        assert got.dtype == dtype and torch.equal(problem.weight, before)
        # Equal but for values that fp32 rounding put across a rounding boundary: one last place.
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6)
