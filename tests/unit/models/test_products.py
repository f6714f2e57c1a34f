"""Which library multiplies: timed once, kept for the machine, and recorded with a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phlora.adapters.attach import attach
from phlora.adapters.speed import at_speed, speed_up
from phlora.lora import matmul
from phlora.lora.matmul import Kind, Library
from phlora.models import products
from phlora.models.products import CHOICES_FILE, Shapes, choose_libraries, time_libraries
from phlora.testing import tiny_phi3

SHAPES = Shapes(linears=((320, 640), (640, 300)), head=(300, 16_384), rank=4, layers=2)
ALL_BLAS = {kind.value: Library.BLAS.value for kind in Kind}
# By torch's own word: where Phlora alone does not find it, the tests fail.
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder for the test, and the libraries as they were after it."""
    monkeypatch.setenv("PHLORA_CACHE", str(tmp_path / "cache"))
    before = matmul.libraries()
    matmul.use_libraries({kind.value: Library.ONEDNN.value for kind in Kind})
    yield tmp_path / "cache"
    matmul.use_libraries(before)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny adapted model that counts as one whose products take time."""
    monkeypatch.setattr(products, "_SMALLEST_WEIGHT", 1)
    return attach(tiny_phi3()[0], {"r": 4, "target_modules": "all-linear"}).model


class Clock:
    """Time that passes only where a product is made slow."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def slowed(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def slow(*args: Any) -> torch.Tensor:
            self.now += 1
            return function(*args)

        return slow


def test_the_shapes_of_a_model_are_those_of_its_frozen_layers(large: Any) -> None:
    config = large.config
    narrow, wide = config.hidden_size, 2 * config.intermediate_size
    shapes = Shapes.of(large)
    assert shapes.linears == ((narrow, wide), (config.hidden_size, config.hidden_size))
    assert shapes.head == (config.hidden_size, config.vocab_size)
    assert (shapes.rank, shapes.layers) == (4, config.num_hidden_layers)
    for parameter in large.parameters():
        parameter.requires_grad_(False)
    assert Shapes.of(large) == shapes


@needs_onednn
@pytest.mark.parametrize("slow", Library)
def test_each_kind_gets_the_faster_library(slow: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(products, "time", clock)
    monkeypatch.setattr(matmul, "_LEAST_WORK", 0)
    if slow is Library.ONEDNN:
        monkeypatch.setattr(matmul, "_onednn_linear", clock.slowed(matmul._onednn_linear))
    else:
        monkeypatch.setattr(torch.Tensor, "__matmul__", clock.slowed(torch.Tensor.__matmul__))
        monkeypatch.setattr(matmul.F, "linear", clock.slowed(nn.functional.linear))
    fast = next(library for library in Library if library is not slow)
    before = matmul.libraries()
    assert time_libraries(SHAPES) == {kind.value: fast.value for kind in Kind}
    assert matmul.libraries() == before


@needs_onednn
def test_every_product_is_timed_as_the_kind_that_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Kind] = []
    original = matmul.kind_of
    monkeypatch.setattr(matmul, "_LEAST_WORK", 0)
    monkeypatch.setattr(matmul, "kind_of", lambda *args: seen.append(original(*args)) or seen[-1])
    for kind, timed in products._products(SHAPES):
        seen.clear()
        for product in timed:
            product()
        assert seen and set(seen) == {kind}


@needs_onednn
def test_a_choice_is_made_once_and_kept_for_every_later_process(
    large: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "time_libraries", lambda shapes: ALL_BLAS)
    choose_libraries(large)
    assert matmul.libraries() == ALL_BLAS and matmul.backend() == "torch's BLAS"
    matmul.use_libraries({kind.value: Library.ONEDNN.value for kind in Kind})
    monkeypatch.setattr(products, "time_libraries", lambda shapes: pytest.fail("timed again"))
    choose_libraries(large)
    assert matmul.libraries() == ALL_BLAS
    assert list(json.loads((own_cache / CHOICES_FILE).read_text(encoding="utf-8")).values()) == [ALL_BLAS]


@needs_onednn
@pytest.mark.parametrize("content", ["", "[]", '{"other": {}}', "no JSON"])
def test_another_choice_or_a_broken_file_does_not_matter(
    content: str, large: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.mkdir()
    (own_cache / CHOICES_FILE).write_text(content, encoding="utf-8")
    monkeypatch.setattr(products, "time_libraries", lambda shapes: ALL_BLAS)
    choose_libraries(large)
    kept = json.loads((own_cache / CHOICES_FILE).read_text(encoding="utf-8"))
    assert ALL_BLAS in kept.values() and len(kept) == 1 + ("other" in content)


@needs_onednn
def test_a_cache_that_cannot_be_written_is_none(
    large: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.write_text("a file where the folder would be", encoding="utf-8")
    monkeypatch.setattr(products, "time_libraries", lambda shapes: ALL_BLAS)
    choose_libraries(large)
    assert matmul.libraries() == ALL_BLAS


def test_a_small_model_and_one_off_the_cpu_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "time_libraries", lambda shapes: pytest.fail("timed"))
    before = matmul.libraries()
    matmul.use_libraries(ALL_BLAS)
    choose_libraries(nn.Linear(4096, 4096, device="meta"))
    assert matmul.libraries() == ALL_BLAS
    # What a larger model left behind would change its bits.
    choose_libraries(tiny_phi3()[0])
    assert matmul.libraries() == before


def test_a_run_that_goes_on_multiplies_as_it_began(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "time_libraries", lambda shapes: pytest.fail("timed"))
    recorded = {**matmul.libraries(), "forward": Library.BLAS.value, "of another version": "anything"}
    with at_speed(large, "auto", libraries=recorded):
        assert matmul.libraries()["forward"] == Library.BLAS.value
        assert matmul.libraries()["backward"] == Library.ONEDNN.value


@needs_onednn
def test_speeding_up_chooses(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "time_libraries", lambda shapes: ALL_BLAS)
    speed_up(large)
    assert matmul.libraries() == ALL_BLAS
