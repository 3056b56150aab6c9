"""Students learn with their quantizers in place, and teachers keep eight-bit weights as such."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint, save_megatron
from slimtron_common.config import build_config
from slimtron_common.integrations import modelopt_state
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import initialize_parallel
from slimtron_distill.__main__ import main
from slimtron_distill.job.config import DistillJobConfig
from slimtron_distill.job.preflight import preflight
from slimtron_distill.model.teacher import load_teacher
from slimtron_distill.training.log import read_log

Arguments = Callable[..., list[str]]

VOCAB = 300


WEIGHTS: dict[str, dict[str, Any]] = {
    "int4": {"num_bits": 4, "block_sizes": {-1: 16}},
    "int8": {"num_bits": 8, "axis": 0},
    "fp8": {"num_bits": (4, 3), "axis": None},
}
INPUTS = {"num_bits": (4, 3), "axis": None}


@pytest.fixture(scope="module")
def quantized(
    tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The teacher, quantized by ModelOpt alone and saved."""
    folder = tmp_path_factory.mktemp("quantized")

    @functools.cache
    def quantize(name: str) -> Path:
        return _quantize(tiny_teacher, name, folder / name)

    return quantize


def _quantize(model_path: Path, name: str, path: Path) -> Path:
    quantization = pytest.importorskip("modelopt.torch.quantization")
    formats = {"*layers*weight_quantizer": WEIGHTS[name] | {"enable": True}}
    if name == "fp8":
        formats["*layers*input_quantizer"] = INPUTS | {"enable": True}
    settings = {"quant_cfg": {"default": {"enable": False}, **formats}, "algorithm": "max"}
    checkpoint = open_checkpoint(f"hf:{model_path}")
    with initialize_parallel(device="cpu") as context, modelopt_state.quiet_modelopt():
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        quantization.quantize(model, settings, lambda model: _logits(model, VOCAB))
        save_megatron(
            path, model, checkpoint.architecture, context, companions=checkpoint.companion_files()
        )
    return path


def _logits(model: Any, vocab_size: int) -> torch.Tensor:
    tokens = torch.arange(48).reshape(2, 24) * 7 % vocab_size
    with torch.no_grad():
        logits: torch.Tensor = model(tokens, torch.arange(24).expand_as(tokens), None)
    return logits


def test_it_learns_and_keeps_its_quantizers(
    arguments: Arguments, quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    out, student = tmp_path / "out", quantized("int4")
    more = ("--student", f"megatron:{student}", "--export-format", "megatron")
    # The same sequences again and again, which it learns by heart.
    longer = ("--steps", "40", "--seq-len", "64", "--num-tokens", "512", "--warmup-steps", "4")
    rarely = ("--save-interval", "40", "--eval-interval", "40")
    assert main(arguments("run", *more, *longer, *rarely)) == 0
    # Its weights are the teacher's, rounded: training makes up for the rounding.
    losses = [record["loss"] for record in read_log(out / "train.jsonl") if "loss" in record]
    assert 0 < sum(losses[-4:]) < 0.9 * sum(losses[:4])
    scales = {path: _scales(path) for path in (student, out)}
    assert len(scales[out]) > 8
    for name, scale in scales[student].items():
        assert torch.equal(scales[out][name], scale), name


def _scales(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(f"megatron:{path}")
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=torch.float32)
        checkpoint.load(model, context)
        return {name: value for name, value in model.state_dict().items() if "_amax" in name}


def test_what_would_lose_them_is_refused(
    arguments: Arguments,
    quantized: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments("run", "--student", f"megatron:{quantized('int4')}")) == 2
    message = capsys.readouterr().err
    assert "holds quantizers" in message
    assert "--export-format megatron" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_teachers_weights_stay_in_eight_bits(
    name: str, dtype: torch.dtype, quantized: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(f"megatron:{quantized(name)}")
    packed = name != "int4"
    assert checkpoint.weights_are_bytes == packed
    with initialize_parallel(device="cpu") as context:
        model = build_model(checkpoint.architecture, context, dtype=dtype)
        checkpoint.load(model, context)
        expected = _logits(model.eval(), VOCAB)
        (teacher,) = load_teacher(checkpoint, context, dtype=dtype, vocab_size=VOCAB)
        # In float32 a code times its scale has another last bit, and activations are rounded.
        error = 0 if dtype is torch.bfloat16 else 1e-3
        torch.testing.assert_close(_logits(teacher, VOCAB), expected, rtol=error, atol=error)
        weights = [w for n, w in teacher.named_parameters() if "linear" in n and "norm" not in n]
        assert len(weights) == 4 * checkpoint.architecture.num_layers
        assert all((weight.numel() == 0) == packed for weight in weights)


def test_a_job_plans_with_a_quantized_teacher(
    tiny_teacher: Path, quantized: Callable[[str], Path]
) -> None:
    def teacher_bytes(spec: str) -> float:
        flags = {"student": f"hf:{tiny_teacher}", "teacher": spec, "training.steps": 1}
        flags |= {"output": str(tiny_teacher.parent / "out"), "training.seq_length": 16}
        flags |= {"device": "cpu", "evaluation.num_tokens": 64, "evaluation.seq_length": 16}
        return preflight(build_config(DistillJobConfig, flags=flags)).memory["teacher"]

    whole = teacher_bytes(f"hf:{tiny_teacher}")
    assert teacher_bytes(f"megatron:{quantized('int4')}") == whole
    assert teacher_bytes(f"megatron:{quantized('fp8')}") < 0.6 * whole
