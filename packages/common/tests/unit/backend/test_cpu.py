from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from slimtron_common.backend import cpu_backend, cpu_backend_active
from slimtron_common.backend.cpu import _replacements

CPU = torch.device("cpu")


def redirected() -> list[tuple[Any, str, Any]]:
    return [(owner, name, getattr(owner, name)) for owner, name, _ in _replacements()]


def same(before: list[tuple[Any, str, Any]]) -> bool:
    return all(getattr(owner, name) is value for owner, name, value in before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.empty(2, device="cuda:1"),
        lambda: torch.ones(2, device=torch.device("cuda", 0)),
        lambda: torch.arange(2, device=0),
        lambda: torch.tensor([1, 2], device=torch.cuda.current_device()),
        lambda: torch.full((2,), 1.0, pin_memory=True),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2).cuda(0, non_blocking=True),
        lambda: torch.zeros(2).to("cuda"),
        lambda: torch.zeros(2).to(device="cuda", dtype=torch.float16),
        lambda: torch.zeros(2).to("cuda", torch.float16),
        lambda: torch.zeros(2).to(0),
        lambda: torch.zeros_like(torch.zeros(2), device="cuda"),
        lambda: torch.nn.Linear(2, 2, device="cuda").weight,
        lambda: torch.nn.Linear(2, 2).cuda().weight,
        lambda: torch.nn.Linear(2, 2).to("cuda").weight,
    ],
)
def test_requests_for_a_gpu_are_answered_with_the_cpu(make: Any) -> None:
    with cpu_backend():
        tensor = make()
    assert tensor.device == CPU
    assert not tensor.is_pinned()


def test_types_go_by_the_names_of_cudas() -> None:
    tensor = torch.zeros(2, dtype=torch.bfloat16)
    with cpu_backend():
        assert tensor.type() == "torch.cuda.BFloat16Tensor"
        assert tensor.type(torch.float64).dtype is torch.float64
    assert tensor.type() == "torch.BFloat16Tensor"


def test_what_the_backward_pass_computes_again_is_redirected() -> None:
    from megatron.core.tensor_parallel.random import checkpoint

    devices = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        factor = torch.full((2,), 3.0, device="cuda")
        devices.append(factor.device)
        return x * factor

    x = torch.ones(2, requires_grad=True)
    with cpu_backend():
        checkpoint(forward, False, x).sum().backward()
    assert devices == [CPU, CPU]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 3.0]


def test_other_arguments_are_left_alone() -> None:
    tensor = torch.zeros(2)
    with cpu_backend():
        assert tensor.to(torch.float64).dtype is torch.float64
        assert tensor.to("cuda", torch.float64).dtype is torch.float64
        # A flag, not a device index.
        assert tensor.to(torch.float32, True, True).data_ptr() != tensor.data_ptr()
        assert torch.zeros(2, device="meta").is_meta
        assert torch.sum(torch.ones(3, 2), 0).tolist() == [3.0, 3.0]
        assert tensor.cuda() is tensor


def test_streams_and_generators_are_harmless() -> None:
    with cpu_backend():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), stream:
            stream.wait_stream(torch.cuda.current_stream())
            stream.synchronize()
            stream.record_event().synchronize()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_device(3)
        torch.cuda.manual_seed(5)
        drawn = torch.rand(1)
        state = torch.cuda.get_rng_state()
        assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_collectives_take_what_megatron_core_gives() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with cpu_backend():
            out = [torch.zeros(())]
            dist.all_gather(out, torch.tensor(3.0))
            assert out[0].shape == ()
            assert out[0].item() == 3.0
            rows = [torch.zeros(2, 2)]
            dist.all_gather(rows, torch.ones(2, 2))
            assert rows[0].sum() == 4
            sums = torch.zeros(2, 2)
            dist.reduce_scatter(sums, [torch.ones(2, 2)])
            assert sums.sum() == 4
            sizes, received = torch.tensor([2]), torch.zeros(2, 2)
            dist.all_to_all_single(received, torch.ones(2, 2), sizes, input_split_sizes=sizes)
            assert received.sum() == 4
    finally:
        dist.destroy_process_group()


def test_everything_is_restored() -> None:
    before = redirected()
    assert not cpu_backend_active()
    with cpu_backend():
        assert cpu_backend_active()
        assert not any(getattr(owner, name) is value for owner, name, value in before)
    assert not cpu_backend_active()
    assert same(before)
    _assert_factories_ask_for_cuda()


def test_everything_is_restored_after_an_error() -> None:
    before = redirected()
    with pytest.raises(KeyboardInterrupt), cpu_backend():
        raise KeyboardInterrupt
    assert not cpu_backend_active()
    assert same(before)
    _assert_factories_ask_for_cuda()


def test_everything_is_restored_when_entering_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = redirected()
    replacements = _replacements()

    def broken() -> list[tuple[Any, str, Any]]:
        return [*replacements, (torch.cuda, "no_such_name", None)]

    monkeypatch.setattr("slimtron_common.backend.cpu._replacements", broken)
    with pytest.raises(AttributeError, match="no_such_name"), cpu_backend():
        pytest.fail("the block must not start")
    assert not cpu_backend_active()
    assert same(before)
    _assert_factories_ask_for_cuda()


def test_inner_blocks_change_nothing() -> None:
    before = redirected()
    with cpu_backend():
        inside = redirected()
        with pytest.raises(ZeroDivisionError), cpu_backend():
            raise ZeroDivisionError
        assert same(inside)
        with cpu_backend(), cpu_backend():
            assert same(inside)
        assert cpu_backend_active()
        assert same(inside)
        assert torch.zeros(1, device="cuda").device == CPU
    assert same(before)


def test_factories_are_redirected_in_the_calling_thread_only() -> None:
    found: list[object] = []

    def work() -> None:
        try:
            found.append(torch.zeros(1, device="cuda").device.type)
        except (AssertionError, RuntimeError) as error:
            found.append(error)

    with cpu_backend():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found != ["cpu"]


def test_import_has_no_effect() -> None:
    script = textwrap.dedent(
        """
        import os, sys, torch
        import torch.distributed as dist
        before = (dict(vars(torch.cuda)), dist.all_gather, dict(os.environ))
        import slimtron_common.backend
        assert not slimtron_common.backend.cpu_backend_active()
        after = (dict(vars(torch.cuda)), dist.all_gather, dict(os.environ))
        assert after == before
        assert not torch.cuda.is_initialized()
        assert not any(name.startswith("megatron") for name in sys.modules)
        """
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def _assert_factories_ask_for_cuda() -> None:
    if torch.cuda.is_available():
        assert torch.zeros(1, device="cuda").is_cuda
    else:
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA|cuda"):
            torch.zeros(1, device="cuda")
