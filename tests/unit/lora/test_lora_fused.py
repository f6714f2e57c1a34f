"""fused.py against functional.py, and what it keeps, skips and survives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phlora.lora import DenseWeight, functional, fused, row_blocks

# Relative to the largest value of the compared tensor.
TOLERANCE = {
    torch.float64: 1e-13,  # a few roundings of 2e-16
    torch.float32: 2e-6,  # sums of at most 40 products, added in another order
    torch.bfloat16: 2e-2,  # the reference rounds x Aᵀ Bᵀ, its scaling and the sum apart; each 2^-9
}


@dataclass
class Problem:
    """One adapted fused weight, with everything that can have a gradient as a leaf."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: list[Tensor]
    blocks: tuple

    def run(self, module, *, dropout: float = 0.0, weight=None):
        weight = self.weight if weight is None else weight
        return module.lora_blocks(
            self.x, weight, self.A, self.B, blocks=self.blocks, bias=self.bias, dropout=dropout
        )

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.A, *self.B) if t is not None]

    def gradients(self, module, **kwargs) -> list[Tensor | None]:
        for leaf in self.leaves():
            leaf.grad = None
        y = self.run(module, **kwargs)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
        return [y.detach(), *(None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves())]


SIZES = {"q": 7, "k": 3, "v": 5}
RANKS = {"q": 4, "k": 1, "v": 2}


def make(
    sizes=SIZES,
    enabled=("q", "v"),
    *,
    leading=(2, 3),
    K=9,
    r=RANKS,
    bias=True,
    dtype=torch.float32,
    lora_dtype=None,
    seed=0,
) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    scaling = {name: 0.3 * (i + 1) for i, name in enumerate(sizes)}
    blocks = row_blocks(sizes, enabled, r=r, scaling=scaling)
    N = sum(sizes.values())
    lora_dtype = lora_dtype or dtype
    problem = Problem(
        x=draw(*leading, K).requires_grad_(),
        weight=draw(N, K),
        bias=draw(N) if bias else None,
        A=draw(sum(b.r for b in blocks), K, dtype=lora_dtype).requires_grad_(),
        B=[draw(b.size, b.r, dtype=lora_dtype).requires_grad_() for b in blocks],
        blocks=blocks,
    )
    return problem


def assert_close(ours, expected, *, dtype):
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            assert a.dtype == b.dtype and a.shape == b.shape
            scale = b.abs().max().clamp(min=1e-3)
            assert ((a - b).abs().max() / scale).item() <= TOLERANCE[dtype]


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


# What is kept for backward.


def kept_tensors(function) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = function()
    return y, kept


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


# The frozen weight as an operand.


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


# Dropout by regenerated mask.


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


# Under the machinery of training.


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


# Whoever follows each operation gets the formulas.


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


# The dense delta and the merge.


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
