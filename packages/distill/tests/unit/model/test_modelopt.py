"""ModelOpt's distillation model, adjusted for Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from slimtron_common.errors import UnsupportedModelError
from slimtron_common.models.architecture import Architecture
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, initialize_parallel
from slimtron_distill import DistillationConfig, adjust_distillation_model_for_mcore

distill = pytest.importorskip("modelopt.torch.distill")


class _Logits(nn.modules.loss._Loss):
    def forward(self, ours: Any, theirs: Any) -> torch.Tensor:
        return (ours[0] - theirs[0]).square().mean()


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def _model(layers: int, width: int, context: ParallelContext) -> Any:
    architecture = Architecture(
        family="llama",
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        vocab_size=64,
        max_position_embeddings=32,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
    )
    model = build_model(architecture, context, dtype=torch.float32, layer_spec="local")
    generator = torch.Generator().manual_seed(layers)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.requires_grad_(True)


def _converted(context: ParallelContext) -> Any:
    settings = {
        "teacher_model": _model(3, 24, context),
        "criterion": {("output_layer", "output_layer"): _Logits()},
    }
    return distill.convert(_model(2, 32, context), mode=[("kd_loss", settings)])


def test_it_is_the_student_with_a_teacher(context: ParallelContext) -> None:
    from modelopt.torch.opt import ModeloptStateManager

    plain = _model(2, 32, context)
    tokens, positions = torch.arange(16)[None], torch.arange(16)[None]
    labels = tokens + 1
    expected = plain(tokens, positions, None, labels=labels)

    model = _converted(context)
    adjust_distillation_model_for_mcore(model, DistillationConfig())
    assert not ModeloptStateManager.is_converted(model)
    assert model.sharded_state_dict().keys() == plain.sharded_state_dict().keys()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(p.requires_grad for p in model.teacher_model.parameters())

    model.train()
    assert not any(module.training for module in model.teacher_model.modules())
    assert not model(tokens, positions, None, labels=labels).any()
    loss = model.compute_kd_loss()
    loss.backward()
    assert model.decoder.layers[0].mlp.linear_fc1.weight.grad.any()
    assert all(p.grad is None for p in model.teacher_model.parameters())

    model.eval()
    torch.testing.assert_close(model(tokens, positions, None, labels=labels), expected)


def test_the_language_loss_may_stay(context: ParallelContext) -> None:
    model = _converted(context)
    adjust_distillation_model_for_mcore(model, DistillationConfig(skip_lm_loss=False))
    model.train()
    tokens, positions = torch.arange(16)[None], torch.arange(16)[None]
    found = model(tokens, positions, None, labels=tokens + 1)
    expected = _model(2, 32, context)(tokens, positions, None, labels=tokens + 1)
    torch.testing.assert_close(found, expected)


def test_another_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no distillation model"):
        adjust_distillation_model_for_mcore(nn.Linear(1, 1), DistillationConfig())
    with pytest.raises(UnsupportedModelError):
        adjust_distillation_model_for_mcore(SimpleNamespace(), DistillationConfig())
