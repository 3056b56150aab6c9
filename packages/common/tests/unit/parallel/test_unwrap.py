from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import (
    ParallelContext,
    initialize_parallel,
    unwrap_chunks,
    unwrap_model,
)
from slimtron_common.parallel.unwrap import is_megatron_model

TINY = Architecture(
    family="llama",
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=8,
    vocab_size=32,
    max_position_embeddings=32,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)


class DDP(nn.Module):
    """As Megatron's and torch's distributed data parallel hold their model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class GPTModel(nn.Module):
    """As NeMo's Lightning module of this name: the model is a property that looks deeper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def module(self) -> nn.Module:
        return self.inner


class MegatronParallel(nn.ModuleList):
    """As NeMo's: a list of chunks that passes unknown attributes on to the first one."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not len(self):
                raise
            return getattr(self[0], name)


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


@pytest.fixture(scope="module")
def chunks(context: ParallelContext) -> list[Any]:
    return [build_model(TINY, context, dtype=torch.bfloat16) for _ in range(2)]


def float16_module(model: Any) -> nn.Module:
    from megatron.core.transformer.module import Float16Module

    config = dataclasses.replace(model.config, bf16=True)
    wrapped: nn.Module = Float16Module(config, model)
    return wrapped


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: [m],
        lambda m: (m,),
        DDP,
        float16_module,
        lambda m: DDP(float16_module(m)),
        GPTModel,
        lambda m: GPTModel(DDP(float16_module(m))),
        lambda m: MegatronParallel([DDP(GPTModel(m))]),
        lambda m: MegatronParallel([GPTModel(DDP(float16_module(m)))]),
        lambda m: [DDP(nn.ModuleList([GPTModel(m)]))],
        lambda m: types.SimpleNamespace(module=m),
    ],
    ids=[
        "bare",
        "list",
        "tuple",
        "ddp",
        "float16",
        "ddp of float16",
        "lightning",
        "lightning of ddp",
        "nemo, ddp outside",
        "nemo, ddp inside",
        "list of ddp of list",
        "any holder",
    ],
)
def test_the_model_is_found_in_what_holds_it(chunks: list[Any], wrap: Any) -> None:
    assert unwrap_model(wrap(chunks[0])) is chunks[0]


def test_chunks_come_in_their_order(chunks: list[Any]) -> None:
    for holder in (
        chunks,
        tuple(chunks),
        nn.ModuleList(chunks),
        [DDP(chunk) for chunk in chunks],
        MegatronParallel([GPTModel(DDP(chunk)) for chunk in chunks]),
        DDP(MegatronParallel(chunks)),
    ):
        found = unwrap_chunks(holder)
        assert [id(chunk) for chunk in found] == [id(chunk) for chunk in chunks]


def test_several_chunks_are_not_one_model(chunks: list[Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="virtual pipeline") as caught:
        unwrap_model(MegatronParallel(chunks))
    assert caught.value.found == "2 chunks"


def test_a_real_data_parallel_wrapper_is_opened(
    chunks: list[Any], context: ParallelContext
) -> None:
    model = chunks[0].requires_grad_(True)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert unwrap_model(wrapped) is model
    finally:
        model.requires_grad_(False)


@pytest.mark.parametrize("name", ["GPTModel", "HybridModel", "MambaModel"])
def test_models_are_known_by_name_and_package(name: str) -> None:
    ours = type(name, (nn.Module,), {"__module__": "megatron.core.models.somewhere"})
    theirs = type(name, (nn.Module,), {"__module__": "nemo.collections.llm"})
    # ModelOpt makes a class on the fly whose base is the model's.
    converted = type(f"Quant{name}", (ours,), {"__module__": "modelopt.torch"})
    assert is_megatron_model(ours())
    assert is_megatron_model(converted())
    assert not is_megatron_model(theirs())
    assert unwrap_model([converted()]) is not None


def test_the_class_itself_is_no_model() -> None:
    from megatron.core.models.gpt import GPTModel as Bare

    assert not is_megatron_model(Bare)


@pytest.mark.parametrize(
    "holder",
    [
        None,
        3,
        "GPTModel",
        b"GPTModel",
        [],
        ["a"],
        nn.Linear(2, 2),
        nn.ModuleList(),
        DDP(nn.Linear(2, 2)),
    ],
    ids=lambda h: type(h).__name__,
)
def test_anything_else_is_refused(holder: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="no Megatron-Core") as caught:
        unwrap_model(holder)
    assert type(holder).__name__ in str(caught.value.found)


def test_a_holder_of_itself_ends() -> None:
    holder = types.SimpleNamespace()
    holder.module = holder
    with pytest.raises(UnsupportedModelError):
        unwrap_model(holder)
