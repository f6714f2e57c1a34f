"""Chains of element-wise operations in one pass over memory each: `kernels.c`, compiled for the CPU that runs it.

torch computes such a chain one operation after the other, each of them through memory. On Linux with a C compiler
(`CC`, else `gcc` or `cc`) they are compiled at their first use, which takes a second, and kept in the cache folder.
Without one, or with `PHLORA_KERNELS=0`, torch computes them, as it does on other devices, in other dtypes, and where
autograd or a compiler follows each operation (`fits`).

Legend: `B` rows, `T` tokens (any leading dimensions), `D` model width, `I` width inside the MLP, `H` query heads, `G`
kv heads, `E` head width, `R` of its numbers rotated.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from phlora.files import cache_root
from phlora.lora.autograd import sees_through

_SOURCE = Path(__file__).with_name("kernels.c")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# What lets comparisons become minima and maxima. Numbers that are not finite stay so, and nothing is summed in another
# order. No code is linked that changes how the rest of the process computes, as -ffast-math does.
_FLAGS = tuple(
    "-O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffinite-math-only -fno-signed-zeros".split()
)
_FLAGS_OF_X86 = ("-march=native", "-mprefer-vector-width=512")
_LONGEST_COMPILATION = 60.0
_OFF = ("0", "false", "off", "no")
# Tensors without numbers stand for real ones in a forecast.
_KINDS = (Tensor, nn.Parameter, FakeTensor)


class _NoKernels(Exception):
    """Why there are none."""


def obstacle() -> str | None:
    """Why torch computes the chains on a CPU; None: they are compiled."""
    found = _library()
    return found if isinstance(found, str) else None


def digest() -> str | None:
    """What tells the code that is compiled from any other; None: torch computes."""
    found = _library()
    return None if isinstance(found, str) else Path(found._name).stem.rpartition("-")[2]


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether anything is compiled for numbers of this kind at this place."""
    return dtype in _NAMES and device.type == "cpu"


def fits(*tensors: Tensor) -> bool:
    """Whether the functions of this module may compute with these tensors; cheap checks first."""
    dtype, recorded = tensors[0].dtype, torch.is_grad_enabled()
    if dtype not in _NAMES:
        return False
    for x in tensors:
        if x.dtype != dtype or type(x) not in _KINDS or x.device.type != "cpu" or not _lies_in_memory(x):
            return False
        if recorded and x.requires_grad:
            return False
    return not sees_through() and not isinstance(_library(), str)


def _lies_in_memory(x: Tensor) -> bool:
    """Whether there are numbers at the address of a tensor, and they are its own: what reads them by it goes by that.

    Not so with sparse and oneDNN's layouts, tensors that torch keeps as a sign (a view that is the negative of another
    one) or as the word that they are zero, and those of no numbers at all.
    """
    return x.layout is torch.strided and x.numel() > 0 and not x.is_neg() and not torch._is_zerotensor(x)


def gate(gate_up: Tensor) -> Tensor:
    """gate_up (..., 2I) -> `up · silu(gate)` (..., I)."""
    gate_up = gate_up.contiguous()
    y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _call("gate", [gate_up, y], _rows(y), y.shape[-1])
    return y


def gate_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up (..., 2I)."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    gradient = torch.empty_like(gate_up)
    _call("gate_backward", [dy, gate_up, gradient], _rows(dy), dy.shape[-1])
    return gradient


def normalize(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x (..., D), rstd (..., 1) in float32, weight (D,) -> `weight · x · rstd`, to the bits that torch computes."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    _call("normalize", [x, rstd.contiguous(), weight, y], _rows(x), x.shape[-1])
    return y


def normalize_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x (..., D) where `rstd` is `1 / sqrt(mean(x²) + eps)`."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    _call("normalize_backward", [dy, x, rstd.contiguous(), weight, dx], _rows(x), x.shape[-1])
    return dx


def split_and_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, T, (H + 2G) E), cos and sin (B, T, R) -> q (B, T, H, E), k and v (B, T, G, E), q and k rotated."""
    qkv, cos, sin = qkv.contiguous(), *_of_all_rows(cos, sin, qkv)
    heads = qkv.shape[-1] // head_dim - 2 * num_kv_heads
    q, k, v = (qkv.new_empty(*qkv.shape[:-1], n, head_dim) for n in (heads, num_kv_heads, num_kv_heads))
    sizes = (_rows(qkv), heads, num_kv_heads, head_dim, cos.shape[-1])
    _call("split_and_rotate", [qkv, cos, sin, q, k, v], *sizes)
    return q, k, v


def join_and_rotate_back(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv (B, T, (H + 2G) E) from those of q (B, T, H, E), k and v (B, T, G, E)."""
    cos, sin = _of_all_rows(cos, sin, dq)
    gradients = [_by_token(x) for x in (dq, dk, dv)]
    heads, kv_heads, width = dq.shape[2], dk.shape[2], dq.shape[3]
    d_qkv = dq.new_empty(*dq.shape[:2], (heads + 2 * kv_heads) * width)
    strides = [stride for x in gradients for stride in (x.stride(0), x.stride(1))]
    sizes = (_rows(d_qkv), heads, kv_heads, width, cos.shape[-1])
    _call("join_and_rotate_back", [*gradients, cos, sin, d_qkv], *strides, *sizes)
    return d_qkv


def _of_all_rows(cos: Tensor, sin: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Angles (1 or B, T, R) for each of the B rows of x."""
    return (angle.expand(len(x), -1, -1).contiguous() for angle in (cos, sin))


def _by_token(x: Tensor) -> Tensor:
    """x (B, T, H, E) as (B T, H, E): token t lies t times a stride after the first; a copy only where it must be.

    As one dimension: the stride of a dimension of one, such as T of single tokens, may be any number.
    """
    x = x.flatten(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _call(name: str, tensors: Sequence[Tensor], *numbers: int) -> None:
    if any(isinstance(x, FakeTensor) for x in tensors):
        return
    library = _library()
    assert not isinstance(library, str)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    function = getattr(library, f"{name}_{_NAMES[tensors[0].dtype]}")
    function(*pointers, *(ctypes.c_longlong(n) for n in (*numbers, torch.get_num_threads())))


@functools.cache
def _library() -> ctypes.CDLL | str:
    """What is compiled, or why nothing is."""
    try:
        return _loaded(_compiled())
    except (_NoKernels, OSError, subprocess.SubprocessError) as reason:
        return str(reason)


def _loaded(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    if not _computes_rightly(library):
        raise _NoKernels(f"{file} does not compute what torch does")
    return library


def _computes_rightly(library: ctypes.CDLL) -> bool:
    """The gated product, which has the most of a compiler's work in it, number by number."""
    gate, up = [0.4 * n - 19 for n in range(96)], [3 - 0.05 * n for n in range(96)]
    both, y = (ctypes.c_float * 192)(*gate, *up), (ctypes.c_float * 96)()
    library.gate_f32(both, y, *(ctypes.c_longlong(n) for n in (1, 96, 1)))
    return all(
        math.isclose(found, u * g / (1 + math.exp(-g)), rel_tol=1e-5, abs_tol=1e-7)
        for found, g, u in zip(y, gate, up, strict=True)
    )


def _compiled() -> Path:
    """The shared library in the cache folder, compiled where it is not there yet."""
    switch = os.environ.get("PHLORA_KERNELS", "")
    if switch.lower() in _OFF:
        raise _NoKernels(f"PHLORA_KERNELS is {switch}")
    if sys.platform != "linux":
        raise _NoKernels("they are compiled on Linux only")
    flags = [*_FLAGS, *(_FLAGS_OF_X86 if platform.machine() == "x86_64" else ())]
    openmp = _openmp()
    facts = [_SOURCE.read_bytes(), " ".join([*flags, openmp]).encode(), _cpu_flags()]
    name = f"kernels-{_digest(b'|'.join(facts))}"
    for file in cache_root().glob(f"{name}-*.so"):
        if _is_whole(file):
            return file
        # What a full disk or an interrupted copy has left: to load it would end the process.
        file.unlink()
    return _compile(name, flags, openmp)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _is_whole(file: Path) -> bool:
    """Whether a file has the content that its name says, and nobody else can write into it."""
    status = file.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return file.stem.rpartition("-")[2] == _digest(file.read_bytes())


def _compile(name: str, flags: Sequence[str], openmp: str) -> Path:
    """Compile into the cache folder: a file that is named after its source and its content."""
    # CC may hold arguments, or a program that calls the compiler: `ccache gcc`.
    compiler = shlex.split(os.environ.get("CC") or "") or [shutil.which("gcc") or shutil.which("cc") or ""]
    if not compiler[0]:
        raise _NoKernels("no C compiler")
    cache = cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        parts, whole = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        # Linked with the threads that torch has: those of a second library would wait for work beside them.
        for command in (
            [*compiler, *flags, "-c", str(_SOURCE), "-o", str(parts)],
            [*compiler, "-shared", str(parts), openmp, "-o", str(whole)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_COMPILATION)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
                raise _NoKernels(f"{compiler[0]} failed: {said}")
        if not whole.is_file():
            raise _NoKernels(f"{compiler[0]} wrote nothing")
        whole.chmod(0o755)
        return whole.replace(cache / f"{name}-{_digest(whole.read_bytes())}.so")


def _openmp() -> str:
    """The file of the OpenMP library whose threads torch uses; other packages bring libraries of their own."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    loaded = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps)
    found = [Path(path) for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5"))]
    packages = Path(torch.__file__).resolve().parents[1]
    of_torch = [
        path for path in found if path.parent in (packages / "torch" / "lib", packages / "torch.libs")
    ]
    of_the_system = [path for path in found if packages not in path.parents]
    for path in (*of_torch, *of_the_system):
        if path.is_file():
            return str(path)
    raise _NoKernels("torch has no OpenMP library that gcc's code can use")


def _cpu_flags() -> bytes:
    """What this CPU can do, as the system says it."""
    for line in Path("/proc/cpuinfo").read_bytes().splitlines():
        if line.startswith((b"flags", b"Features")):
            return line
    return platform.machine().encode()
