"""The CPU's kernels with their log-sum-exp: against softmax by its formula in float64, and in parts."""

from __future__ import annotations

import pytest
import torch

from phlora.models import cpu_attention

needs_kernels = pytest.mark.skipif(not cpu_attention.is_there(), reason="this torch has no such kernels")


def projections(queries: int, keys: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (queries, keys, keys)]


def by_formula(q, k, v, scaling, *, is_causal):
    scores = scaling * q @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@needs_kernels
@pytest.mark.parametrize("length", [1, 7, 130, 300])
def test_causal_attention_and_its_gradients_are_the_formula_s(length):
    inputs = [x.requires_grad_() for x in projections(length, length)]
    expected = by_formula(*inputs, 0.4, is_causal=True)
    dy = torch.randn_like(expected[0])
    gradients = torch.autograd.grad(expected[0], inputs, dy)
    with torch.no_grad():
        found = cpu_attention.causal(inputs, 0.4)
        ours = cpu_attention.causal_backward(dy, [*inputs, *found], 0.4)
    for a, b in zip([*found, *ours], [*expected, *gradients], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@needs_kernels
def test_two_sets_of_keys_are_merged_into_one_softmax():
    q, k, v = projections(5, 9)
    out, lse = (x.clone() for x in cpu_attention.unmasked([q, k[:, :, :4], v[:, :, :4]], 0.4))
    cpu_attention.merge_(out, lse, *cpu_attention.unmasked([q, k[:, :, 4:], v[:, :, 4:]], 0.4))
    for a, b in zip((out, lse), by_formula(q, k, v, 0.4, is_causal=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [2, 63, 127, 128, 129, 600, 2047, 2049])
def test_a_long_row_is_cut_into_stretches_that_meet_what_they_should(length) -> None:
    query = torch.empty(1, 1, length, 1)
    covered, work = [], 0
    for span, stop, mask in cpu_attention._stretches(query):
        covered += range(span.start, span.stop)
        work += (span.stop - span.start) * stop
        if mask is not None:
            causal = torch.arange(stop) <= torch.arange(span.start, span.stop)[:, None]
            assert torch.equal(mask[0, 0] == 0, causal) and torch.equal(mask[0, 0] == -torch.inf, ~causal)
    assert covered == [*range(length)]
    assert length < 128 or work < 0.76 * length**2
