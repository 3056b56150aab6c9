"""Time and memory of the distillation loss, forward and backward, beside its peers.

    python benchmarks/kd_loss.py                          all sections and sizes
    python benchmarks/kd_loss.py --sections logits --tokens 4096 --vocab 128256 --dtypes bf16
    python benchmarks/kd_loss.py --nemo DIR               NeMo 2.7.3 unpacked in DIR

Peers that are not installed are left out: nvidia-modelopt and megatron-core, liger-kernel, and
nemo-toolkit 2.7.3, of which only the file with the loss is loaded. All compute the forward KL at
temperature 1, summed over the tokens. Times are medians by CUDA events; memory is the peak beyond
the inputs, the gradient included. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from slimtron_distill.losses import LogitLossSettings, kd_loss, linear_kd_loss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = {
    "reverse KL": LogitLossSettings(kind="reverse_kl"),
    "JSD": LogitLossSettings(kind="jsd"),
}
NEMO_LOSS = "nemo/collections/llm/modelopt/distill/loss.py"
MILLISECONDS_EACH = 400
GIB = 2**30

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", default=["logits", "linear"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--vocab", nargs="+", type=int, default=[32000, 128256, 256000])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--nemo", type=Path, help="folder that holds NeMo's package `nemo`")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.manual_seed(torch.seed())
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, bytes read and written")
    results: dict[str, dict[str, tuple[float, float] | str]] = {}
    if "logits" in arguments.sections:
        peers = logit_peers(arguments.nemo)
        for dtype in arguments.dtypes:
            for vocab in arguments.vocab:
                for tokens in arguments.tokens:
                    title = f"logits {tokens} x {vocab} {dtype}"
                    results[title] = logits_section(
                        title, tokens, vocab, DTYPES[dtype], bandwidth, peers
                    )
    if "linear" in arguments.sections:
        title = "output layers and loss, 8192 tokens, hidden 4096, vocabulary 128256, bf16"
        results[title] = linear_section(title, 8192, 4096, 128256)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def logits_section(
    title: str,
    tokens: int,
    vocab: int,
    dtype: torch.dtype,
    bandwidth: float,
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]],
) -> dict[str, tuple[float, float] | str]:
    torch.compiler.reset()  # It compiles for a few shapes only.
    student = torch.randn(tokens, 1, vocab, device="cuda", dtype=dtype).requires_grad_()
    teacher = torch.randn_like(student).detach()
    print(f"\n{title}")
    for passes in (3, 5):
        floor = passes * student.nbytes / bandwidth * 1e3
        print(f"  {f'floor, {passes} accesses a logit':44} {floor:8.2f} ms")

    def step(loss: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Step:
        def run() -> None:
            student.grad = None
            (loss(student, teacher) * scale).backward()

        return run

    def ours(settings: LogitLossSettings, **options: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, t: kd_loss(s, t, settings, **options)

    steps = {name: step(loss) for name, loss in peers.items()}
    steps["Slimtron"] = step(ours(LogitLossSettings()))
    steps["Slimtron, scaled on backward"] = step(ours(LogitLossSettings()), 1 / 3)
    for name, settings in KINDS.items():
        steps[f"Slimtron, {name}"] = step(ours(settings))
    # Last: it overwrites the logits.
    steps["Slimtron, in place"] = step(ours(LogitLossSettings(), inplace=True))
    return measure_all(steps, student)


def linear_section(
    title: str, tokens: int, hidden: int, vocab: int
) -> dict[str, tuple[float, float] | str]:
    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, device="cuda") * hidden**-0.25).bfloat16()

    inputs, teacher_inputs = normal(tokens, hidden).requires_grad_(), normal(tokens, hidden)
    head, teacher_head = normal(vocab, hidden).requires_grad_(), normal(vocab, hidden)
    main_grad = torch.zeros(vocab, hidden, device="cuda")
    print(f"\n{title}")

    def products() -> None:
        with torch.no_grad():
            logits = inputs @ head.t()
            teacher_inputs @ teacher_head.t()
            logits @ head
            logits.t() @ inputs

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            inputs.grad = head.grad = None
            loss().backward()

        return run

    def ours(gibibytes: float | None, into: Tensor | None = None) -> Callable[[], Tensor]:
        return lambda: linear_kd_loss(
            inputs,
            head,
            teacher_inputs,
            teacher_head,
            LogitLossSettings(),
            main_grad=into,
            logit_bytes=None if gibibytes is None else int(gibibytes * GIB),
        )

    def whole(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                teacher_logits = teacher_inputs @ teacher_head.t()
            return loss(inputs @ head.t(), teacher_logits)

        return run

    steps: dict[str, Step] = {"the four matrix products alone": products}
    if liger_linear := liger_linear_peer():
        steps["Liger fused linear JSD, beta 0"] = step(
            lambda: liger_linear(inputs, head, teacher_inputs, teacher_head)
        )
    steps["logits and torch.compile"] = step(whole(torch.compile(plain_kl, dynamic=False)))
    steps["logits and Slimtron, in place"] = step(
        whole(lambda s, t: kd_loss(s, t, LogitLossSettings(), inplace=True))
    )
    for gibibytes in (3.92, 2.0, 1.4, 0.7):
        steps[f"Slimtron, {gibibytes} GiB of logits, main_grad"] = step(ours(gibibytes, main_grad))
    for gibibytes in (2.0, 1.0):
        steps[f"Slimtron, {gibibytes} GiB of logits"] = step(ours(gibibytes))
    steps["Slimtron, default"] = step(ours(None))
    return measure_all(steps, inputs, head)


def measure_all(steps: dict[str, Step], *leaves: Tensor) -> dict[str, tuple[float, float] | str]:
    results: dict[str, tuple[float, float] | str] = {}
    for name, step in steps.items():
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.empty_cache()
        try:
            milliseconds, peak = measure(step)
        except torch.cuda.OutOfMemoryError:
            results[name] = "out of memory"
            print(f"  {name:44} out of memory", flush=True)
        else:
            results[name] = milliseconds, peak
            print(f"  {name:44} {milliseconds:8.2f} ms {peak:7.2f} GiB", flush=True)
    for leaf in leaves:
        leaf.grad = None
    return results


def measure(step: Step) -> tuple[float, float]:
    """Median milliseconds, and GiB at the peak beyond what was there before."""
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    repetitions = 3
    while True:
        times = []
        for _ in range(repetitions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        elapsed = sorted(start.elapsed_time(end) for start, end in times)
        if repetitions > 3:
            return elapsed[len(elapsed) // 2], peak
        repetitions = max(5, min(50, int(MILLISECONDS_EACH / elapsed[1])))


def copy_bandwidth() -> float:
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    milliseconds, _ = measure(lambda: target.copy_(source))
    return 2 * source.nbytes / milliseconds * 1e3


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        F.log_softmax(student.float(), -1),
        F.log_softmax(teacher.float(), -1),
        reduction="sum",
        log_target=True,
    )


def logit_peers(nemo: Path | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    peers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    config = SimpleNamespace(tensor_model_parallel_size=1)
    with optional("NeMo"):
        nemo_loss = nemo_module(nemo).LogitsKLLoss(config)
        peers["NeMo 2.7.3 LogitsKLLoss"] = lambda s, t: nemo_loss(s, t)[0].sum()
    with optional("ModelOpt"):
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

        modelopt_loss = LogitsKLLoss(config)
        peers["ModelOpt LogitsKLLoss"] = lambda s, t: modelopt_loss(s, t)[0].sum()
    peers["torch.compile"] = torch.compile(plain_kl, dynamic=False)
    with optional("Liger"):
        from liger_kernel.ops.jsd import LigerJSDFunction

        def liger(student: Tensor, teacher: Tensor) -> Tensor:
            log_q, log_p = (x.flatten(0, 1).log_softmax(-1) for x in (student, teacher))
            loss: Tensor = LigerJSDFunction.apply(log_q, log_p, None, 0.0)
            return loss

        peers["Liger JSD, beta 0"] = liger
    return peers


def liger_linear_peer() -> Callable[..., Tensor] | None:
    with optional("Liger"):
        from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

        return lambda *tensors: LigerFusedLinearJSDFunction.apply(*tensors, None, 0.0)
    return None


def nemo_module(folder: Path | None) -> ModuleType:
    """The file with NeMo's loss; its package asks for half a hundred others at import."""
    if folder is None:
        found = importlib.util.find_spec("nemo")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'nemo'", name="nemo")
        folder = Path(next(iter(found.submodule_search_locations))).parent
    if not (folder / NEMO_LOSS).is_file():
        raise ModuleNotFoundError(f"no {NEMO_LOSS} in {folder}", name="nemo")
    stand_ins = {
        "nemo": ModuleType("nemo"),
        "nemo.utils": ModuleType("nemo.utils"),
        "nemo.utils.import_utils": ModuleType("nemo.utils.import_utils"),
    }
    stand_ins["nemo.utils"].logging = logging  # type: ignore[attr-defined]
    imports = stand_ins["nemo.utils.import_utils"]
    imports.safe_import = lambda name: (None, False)  # type: ignore[attr-defined]
    imports.safe_import_from = lambda *_, alt: (alt, False)  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("nemo_distill_loss", folder / NEMO_LOSS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return module


@contextlib.contextmanager
def optional(peer: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"{peer} is left out: {error}")


if __name__ == "__main__":
    main()
