"""Compiled chains of element-wise operations compute what torch's operations do."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from phlora.models import kernels, lean_layers

needs_compiler = pytest.mark.usefixtures("compiler")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Widths that no vector of a CPU divides, and enough numbers for several threads.
SHAPES = [(1, 1, 5), (2, 3, 7), (3, 70, 333)]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Skips where no C at all can be compiled; where only these chains cannot, the tests fail."""
    if sys.platform != "linux":
        pytest.skip("no Linux: the chains are compiled there alone")
    if os.environ.get("PHLORA_KERNELS", "").lower() in kernels._OFF:
        pytest.skip("PHLORA_KERNELS turns the chains off")
    command = shlex.split(os.environ.get("CC", "")) or ["gcc" if shutil.which("gcc") else "cc"]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no C compiler: {command[0]}")
    folder = tmp_path_factory.mktemp("compiler")
    (folder / "one.c").write_text("int one(void) { return 1; }\n")
    command += ["-fopenmp", "-fPIC", "-shared", "one.c", "-o", "one.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no C compiler with OpenMP: {command[0]} says {done.stderr.strip()[:200]}")


@pytest.fixture
def by_torch(monkeypatch):
    """Calls a function while nothing is compiled."""

    def call(function, *tensors):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "fits", lambda *tensors: False)
            return function(*tensors)

    return call


def assert_no_less_exact(ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    error, tolerated = ((x.double() - truth).norm() for x in (ours, theirs))
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert error <= 1.1 * tolerated + 1e-7 * truth.norm()


@needs_compiler
def test_the_chains_are_compiled_where_anything_is():
    assert kernels.obstacle() is None


@needs_compiler
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gated_product_and_its_gradient(dtype, shape, by_torch):
    gate_up = (3 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)
    dy = torch.randn(shape).to(dtype)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    truth = F.silu(gate) * up
    assert_no_less_exact(lean_layers._gate(gate_up), by_torch(lean_layers._gate, gate_up), truth.detach())

    def gradient(gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.clone().requires_grad_()
        return torch.autograd.grad(lean_layers._Gate.apply(gate_up), gate_up, dy)[0]

    (truth,) = torch.autograd.grad(truth, exact, dy.double())
    assert_no_less_exact(gradient(gate_up), by_torch(gradient, gate_up), truth)


@needs_compiler
@dtypes
def test_a_gate_that_is_far_from_zero(dtype):
    ends = [-math.inf, -3e38, -1e36, -1e4, -200.0, -90.0, -87.0, 87.0, 90.0, 1e4, 3e38, math.inf, math.nan]
    gate = torch.tensor(ends).to(dtype)
    y = lean_layers._gate(torch.cat([gate, torch.ones_like(gate)]))
    torch.testing.assert_close(y, F.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)
    dx = kernels.gate_backward(torch.ones_like(gate), torch.cat([gate, torch.ones_like(gate)]))
    slopes = torch.tensor([math.nan, *[0.0] * 6, *[1.0] * 4, math.nan, math.nan]).to(dtype)
    torch.testing.assert_close(dx[: len(gate)], slopes, rtol=1e-6, atol=1e-30, equal_nan=True)


@needs_compiler
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_normalizing_to_the_bits_of_torch_and_its_gradient(dtype, shape, by_torch):
    x, weight, dy = (torch.randn(size).to(dtype) for size in (shape, shape[-1:], shape))
    rstd = lean_layers._rstd(x, 1e-5)
    assert torch.equal(kernels.normalize(x, rstd, weight), by_torch(lean_layers._normalize, x, rstd, weight))

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(lean_layers._RMSNorm.apply(x, weight, 1e-5)[0], x, dy)[0]

    exact = x.double().requires_grad_()
    normal = weight.double() * exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    (truth,) = torch.autograd.grad(normal, exact, dy.double())
    assert_no_less_exact(gradient(x), by_torch(gradient, x), truth)


@needs_compiler
@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotated"), [(1, 1, 2, 2), (4, 2, 8, 4), (6, 3, 96, 96)]
)
@pytest.mark.parametrize("angles", [1, 2], ids="angles of {} rows".format)
@pytest.mark.parametrize("tokens", [1, 37])
def test_q_k_and_v_out_of_one_projection_and_back(
    dtype, heads, kv_heads, width, rotated, angles, tokens, by_torch
):
    rows = 2
    qkv = torch.randn(rows, tokens, (heads + 2 * kv_heads) * width).to(dtype)
    # Halves that differ, which the rotary embeddings of today do not use.
    cos, sin = (torch.randn(angles, tokens, rotated).to(dtype) for _ in range(2))

    def split(qkv, cos, sin):
        return lean_layers._SplitAndRotate.apply(qkv, cos, sin, kv_heads, width)

    ours, theirs = split(qkv, cos, sin), by_torch(split, qkv, cos, sin)
    for a, b, truth in zip(ours, theirs, split(qkv.double(), cos.double(), sin.double()), strict=True):
        assert_no_less_exact(a, b, truth)

    # One gradient as attention gives it, one laid out by head and one with gaps between its numbers.
    above = [torch.randn_like(x) for x in ours]
    above[1] = torch.randn(above[1].shape).to(dtype)
    above[2] = torch.randn(*above[2].shape, 2).to(dtype)[..., 0]

    def join(qkv, cos, sin, *above):
        qkv = qkv.clone().requires_grad_()
        return torch.autograd.grad(split(qkv, cos, sin), qkv, above)[0]

    exact = join(*(x.double() for x in (qkv, cos, sin, *above)))
    assert_no_less_exact(join(qkv, cos, sin, *above), by_torch(join, qkv, cos, sin, *above), exact)


def test_where_torch_computes():
    x = torch.ones(2, 4)
    assert not kernels.fits(x.double()) and not kernels.fits(x.half())
    assert not kernels.fits(x, x.bfloat16())
    assert not kernels.fits(x.to("meta"))
    assert not kernels.fits(x.clone().requires_grad_())
    assert not kernels.fits(x[:0])
    assert torch.func.vmap(lambda row: lean_layers._gate(row))(x).shape == (2, 2)


def test_torch_computes_with_what_does_not_lie_in_memory_as_it_is():
    """A negated view has the numbers of the one that it negates; others have none at their address."""
    x = torch.randn(3, 8)
    odd = [torch._neg_view(x), torch._efficientzerotensor(3, 8), x.to_sparse(), x[:, :0]]
    odd += [x.to_mkldnn()] if torch.backends.mkldnn.is_available() else []
    assert [tensor for tensor in odd if kernels.fits(tensor) or kernels.fits(x, tensor)] == []
    torch.testing.assert_close(lean_layers._gate(odd[0]), lean_layers._gate(-x))
    torch.testing.assert_close(lean_layers._gate(odd[1]), torch.zeros(3, 4))


@needs_compiler
@dtypes
def test_views_of_any_strides_have_the_numbers_of_their_copies(dtype):
    x = torch.randn(6, 5, 24).to(dtype)
    for view in (x[::2, :, ::3], x.transpose(0, 1), x[1:, 2:, 4:], x[:1].expand(4, 5, 24), x.flip(-1)):
        assert kernels.fits(view) and torch.equal(kernels.gate(view), kernels.gate(view.clone()))


@needs_compiler
def test_a_forecast_s_tensors_are_made_and_not_computed():
    with FakeTensorMode():
        x = torch.empty(2, 4)
        assert kernels.fits(x) and kernels.gate(x).shape == (2, 2)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("PHLORA_KERNELS", "0", "PHLORA_KERNELS is 0"),
        ("PHLORA_KERNELS", "Off", "PHLORA_KERNELS is Off"),
        ("CC", "false", "false failed: it said nothing"),
        ("CC", "true -O2", "true wrote nothing"),
        ("CC", "/no/such/compiler", "/no/such/compiler"),
    ],
)
def test_without_a_compiler_torch_computes_and_the_reason_is_said(
    setting, value, said, monkeypatch, tmp_path
):
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path))
    monkeypatch.setenv(setting, value)
    found = kernels._library.__wrapped__()
    assert isinstance(found, str) and (said in found or "Linux" in found)
    assert not list(tmp_path.glob("*.so"))


@needs_compiler
@pytest.mark.parametrize("left", [0, 0.1, 0.5, 0.9, 1], ids="{:.0%} of the file".format)
def test_what_was_compiled_is_kept_and_compiled_again_where_it_is_damaged(left, monkeypatch, tmp_path):
    """A part of a library ends the process that loads it, so that it must not be tried."""
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path))
    file = kernels._compiled()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole))])
    if left == 1:
        monkeypatch.setenv("CC", "false")
    assert kernels._compiled() == file and file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@needs_compiler
def test_a_library_into_which_others_can_write_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path))
    kernels._compiled().chmod(0o777)
    assert kernels._compiled().stat().st_mode & 0o022 == 0


def test_the_threads_are_torch_s_whatever_other_packages_brought():
    pytest.importorskip("sentencepiece")
    assert "sentencepiece" not in kernels._openmp()
