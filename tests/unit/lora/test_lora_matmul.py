import os
import subprocess
import sys

import pytest
import torch

from phlora.lora import matmul
from phlora.lora.matmul import Kind, Library

# By torch's own word: where Phlora alone does not find it, the tests fail.
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def onednn_for_all():
    """Every kind by oneDNN, whatever was chosen before in this process."""
    before = matmul.libraries()
    matmul.use_libraries(dict.fromkeys(Kind, Library.ONEDNN))
    yield
    matmul.use_libraries(before)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the products that oneDNN was asked for."""
    shapes, original = [], matmul._onednn_linear

    def counted(x, weight, *rest):
        shapes.append((*x.shape, weight.shape[0]))
        return original(x, weight, *rest)

    monkeypatch.setattr(matmul, "_onednn_linear", counted)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(128, 96, 160), (1024, 64, 16), (1, 1024, 2048), (77, 333, 129)]
)
@needs_onednn
def test_linear_equals_float64(rows, inner, columns, bias, calls):
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    b = torch.randn(columns) if bias else None
    y = matmul.linear(x, weight, b)
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert calls
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("alpha", [1.0, 0.37])
@needs_onednn
def test_matmul_equals_float64_for_plain_and_transposed_factors(alpha, calls):
    left, right = torch.randn(200, 300), torch.randn(300, 400)
    truth = alpha * (left.double() @ right.double())
    transposed = right.t().contiguous().t()
    for factors in [(left, right), (left, transposed), (left.t().contiguous().t(), right)]:
        torch.testing.assert_close(matmul.matmul(*factors, alpha=alpha).double(), truth, rtol=1e-5, atol=1e-4)
    assert len(calls) == 3


@needs_onednn
def test_leading_dimensions_are_kept(calls):
    x, weight = torch.randn(4, 64, 128), torch.randn(96, 128)
    torch.testing.assert_close(
        matmul.linear(x, weight), torch.nn.functional.linear(x, weight), atol=1e-4, rtol=1e-5
    )
    assert calls


@pytest.mark.parametrize(
    "change",
    [
        lambda x, w: (x.double(), w.double()),
        lambda x, w: (x.bfloat16(), w.bfloat16()),
        lambda x, w: (x, torch.randn(256, 300)[:, :256]),
        lambda x, w: (x[:4], w),
        lambda x, w: (x[:0], w),
        lambda x, w: (x.to_sparse(), w),
        lambda x, w: (x, w.to_sparse()),
        lambda x, w: (x.clone().requires_grad_(), w),
        lambda x, w: (x, w.clone().requires_grad_()),
    ],
    ids=[
        "float64",
        "bfloat16",
        "gaps",
        "too little",
        "empty",
        "sparse x",
        "sparse weight",
        "recorded x",
        "recorded weight",
    ],
)
def test_what_does_not_suit_onednn_is_multiplied_by_torch(change, calls):
    x, weight = change(torch.randn(256, 256), torch.randn(256, 256))
    y = matmul.linear(x, weight)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
    assert not calls
    assert y.requires_grad == (x.requires_grad or weight.requires_grad)


@pytest.mark.parametrize(
    "bias",
    [
        torch.randn(256, 3)[:, 0],
        torch.randn(1).expand(256),
        torch.randn(1),
        torch.randn(1, 256),
        torch._neg_view(torch.randn(256)),
        torch.randn(256).requires_grad_(),
    ],
    ids=["a column", "expanded", "one for all", "a row", "negated", "recorded"],
)
@needs_onednn
def test_a_bias_is_added_as_torch_adds_it(bias, calls):
    """oneDNN goes by its address alone, beyond its end too."""
    x, weight = torch.randn(256, 256), torch.randn(256, 256)
    y = matmul.linear(x, weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=1e-5)
    assert not calls and y.requires_grad == bias.requires_grad


def test_reduced_precision_stays_torch_s_affair(calls):
    x, weight = torch.randn(256, 256), torch.randn(256, 256)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        matmul.linear(x, weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert not calls


def test_torch_alone_turns_it_off_and_on_again(calls):
    x, weight = torch.randn(256, 256), torch.randn(256, 256)
    with matmul.torch_alone():
        assert matmul.backend() == "torch's BLAS"
        assert torch.equal(matmul.linear(x, weight), torch.nn.functional.linear(x, weight))
        assert torch.equal(matmul.matmul(x, weight), x @ weight)
    assert not calls


T = 64


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: (torch.empty(T, 512), torch.empty(1024, 512)), Kind.FORWARD),
        (lambda: (torch.empty(2, T, 512), torch.empty(1024, 512)), Kind.FORWARD),
        (lambda: (torch.empty(T, 1024), torch.empty(1024, 512).t()), Kind.BACKWARD),
        (lambda: (torch.empty(T, 512), torch.empty(16, 512)), Kind.ONTO_RANK),
        (lambda: (torch.empty(T, 1024), torch.empty(1024, 16).t()), Kind.ONTO_RANK),
        (lambda: (torch.empty(T, 16).t(), torch.empty(T, 512).t()), Kind.FACTOR_GRADIENTS),
        (lambda: (torch.empty(T, 576), torch.empty(49152, 576)), Kind.HEAD_FORWARD),
        (lambda: (torch.empty(T, 49152), torch.empty(49152, 576).t()), Kind.HEAD_BACKWARD),
        (lambda: (torch.empty(T, 3072), torch.empty(16384, 3072)), Kind.FORWARD),
        (lambda: (torch.empty(T, 16384), torch.empty(16384, 3072).t()), Kind.BACKWARD),
    ],
)
def test_kinds_of_products(make, kind):
    assert matmul.kind_of(*make()) is kind


@needs_onednn
def test_a_kind_that_blas_is_to_multiply_is_multiplied_by_it(calls):
    x, weight, dy = torch.randn(256, 256), torch.randn(512, 256), torch.randn(256, 512)
    matmul.use_libraries({"forward": "torch's BLAS", "no such kind": "oneDNN", "backward": "no such library"})
    assert torch.equal(matmul.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert not calls
    matmul.matmul(dy, weight)
    assert len(calls) == 1
    assert matmul.backend().startswith("torch's BLAS, backward, onto the rank")
    # One token that is answered is bound by reading the weight.
    matmul.linear(torch.randn(1, 2048), torch.randn(1024, 2048))
    assert len(calls) == 2


@pytest.mark.parametrize("variable", ["LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
@pytest.mark.parametrize("own", [None, "7"])
def test_few_prepared_products_are_kept_unless_the_user_says_how_many(variable, own):
    environment = {name: value for name, value in os.environ.items() if name != variable}
    command = f"import os, phlora.lora.matmul; print(os.environ[{variable!r}])"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env=environment if own is None else {**environment, variable: own},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (own or "64")
