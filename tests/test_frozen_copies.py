"""Copies of frozen models: copied, pickled, saved and sent to another process, they compute the same by themselves."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effformer.bench.measure.timm_model import import_torchvision
from frozen_results import MEAN, STD, close
from test_freeze_adapters import YAML, same
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from effformer import EfficientFormer, build_backbone, freeze
from effformer.detectron2 import EfficientFormerBackbone
from effformer.openmm import EffFormer
from effformer.ops import UnsupportedError
from effformer.serving.frozen import Frozen
from effformer.testing import randomise

Narrow = Callable[..., EfficientFormer]


def _pickled(frozen: Frozen) -> Frozen:
    return pickle.loads(pickle.dumps(frozen))


def _saved(frozen: Frozen) -> Frozen:
    file = io.BytesIO()
    torch.save({"frozen": frozen}, file)
    file.seek(0)
    return torch.load(file, weights_only=False, map_location="cpu")["frozen"]


COPIES: list[Callable[[Frozen], Frozen]] = [copy.deepcopy, copy.copy, _pickled, _saved]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_copy_computes_the_same_by_itself(narrow: Narrow, copied: Callable[[Frozen], Frozen], backend: str) -> None:
    model = narrow(dtype=torch.float32)
    frozen = freeze(model, torch.float32, mean=MEAN, std=STD, max_graphs=3, backend=backend)
    images, pixels = torch.randn(2, 3, 40, 48), torch.randint(0, 256, (1, 32, 40, 3), dtype=torch.uint8)
    wanted = frozen(images), frozen(pixels)
    again = copied(frozen)
    assert repr(again) == repr(frozen)
    assert all(torch.equal(again(x), result) for x, result in zip((images, pixels), wanted, strict=True))
    assert not {t.data_ptr() for t in again._packed.tensors()} & {t.data_ptr() for t in frozen._packed.tensors()}
    again.refresh(narrow(seed=1, dtype=torch.float32))
    assert not torch.equal(again(images), wanted[0])
    assert torch.equal(frozen(images), wanted[0])
    with pytest.raises(TypeError, match="images: got torch.float64"):
        again(images.double())


def test_the_model_that_a_copy_refreshes_from(narrow: Narrow) -> None:
    model = narrow()
    frozen, x = freeze(model, torch.float64), torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def holding(*names: str) -> nn.Module:
        holder = nn.Module()
        for name in names:
            setattr(holder, name, {"model": model, "frozen": frozen}[name])
        return holder

    shallow, together, apart = (
        copy.copy(frozen),
        *(copy.deepcopy(holding(*n)) for n in (("model", "frozen"), ("frozen",))),
    )
    randomise(together.model, 1)
    together.frozen.refresh()
    close(together.frozen(x), together.model(x))
    randomise(model, 2)
    shallow.refresh()
    close(shallow(x), model(x))
    for other in (apart.frozen, _pickled(frozen)):  # a guess might be the wrong model
        with pytest.raises(ValueError, match="model: got None, and this is a copy.*; allowed is a model"):
            other.refresh()
        other.refresh(model)
        close(other(x), model(x))


def test_an_average_of_a_module_that_holds_a_frozen_one(narrow: Narrow) -> None:
    student = nn.Module()
    student.network, student.teacher = nn.Linear(2, 2), freeze(narrow(), torch.float64)  # type: ignore[assignment]
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(AveragedModel(student).module.teacher(x), student.teacher(x))


def test_frozen_adapters(narrow: Narrow) -> None:
    import_torchvision()
    from effformer.torchvision import BackboneWithFPN, Body

    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    adapters: list[nn.Module] = [
        BackboneWithFPN(narrow(), out_channels=8),
        Body(narrow(), (1, 3)),
        EfficientFormerBackbone(narrow(), ("res3", "res4")),
        EffFormer(depths=(1, 1, 1, 1), out_indices=(0, 2), dtype=torch.float64),
        *(build_backbone(YAML, task=task, dtype=torch.float64) for task in ("detection", "classification")),
    ]
    for adapter in adapters:
        frozen = freeze(adapter.double().eval(), torch.float64)  # type: ignore[arg-type]
        for again in (copy.deepcopy(frozen), _pickled(frozen)):
            same(again(x), frozen(x))
            again.refresh(adapter)  # type: ignore[arg-type]
            same(again(x), frozen(x))


def _answer(frozen: Frozen, x: Tensor, results: Any) -> None:
    results.put(frozen(x).tolist())


def test_another_process_takes_one(narrow: Narrow) -> None:
    frozen, x = freeze(narrow(), torch.float64), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_answer, args=(frozen, x, results))
    process.start()
    assert torch.allclose(torch.tensor(results.get(timeout=120), dtype=torch.float64), frozen(x), rtol=0, atol=1e-12)
    process.join()


def test_the_backend_is_chosen_where_a_copy_is_loaded(narrow: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    from effformer.kernels import launch

    x = torch.randn(1, 3, 32, 32)
    asked, auto = (freeze(narrow(), torch.float32, backend=backend) for backend in ("triton", "auto"))
    files = [pickle.dumps(one) for one in (asked, auto)]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(UnsupportedError, match="backend='triton'"):
        pickle.loads(files[0])
    found = pickle.loads(files[1])
    assert (found.backend, found.reason is None) == ("eager", False)
    close(found(x), freeze(narrow(), torch.float32, backend="eager")(x), 1e-5)


def test_copies_wait_for_a_refresh_in_another_thread(narrow: Narrow) -> None:
    """Weights that it takes meanwhile are all in the copy, or none."""
    frozen, found = freeze(narrow(), torch.float64), []
    thread = threading.Thread(target=lambda: found.append(copy.deepcopy(frozen)))
    with frozen._turn():  # as `refresh` does
        thread.start()
        thread.join(0.5)
        assert not found
        first = next(frozen._packed.tensors())
        first.zero_()
    thread.join()
    assert torch.equal(next(found[0]._packed.tensors()), first)
