"""NeMo 2's Lightning model of a distillation, where NeMo is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtron_distill
from slimtron_common.errors import MissingDependencyError
from slimtron_common.parallel import initialize_parallel

HAS_NEMO = importlib.util.find_spec("nemo") is not None


@pytest.mark.skipif(HAS_NEMO, reason="NeMo is installed")
def test_without_nemo_it_says_what_to_do() -> None:
    with pytest.raises(MissingDependencyError, match="nemo"):
        _ = slimtron_distill.DistillationGPTModel


def _config(num_layers: int, width: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from nemo.collections import llm

    return llm.GPTConfig(
        num_layers=num_layers,
        hidden_size=width,
        ffn_hidden_size=48,
        num_attention_heads=4,
        seq_length=16,
        vocab_size=128,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        position_embedding_type="rope",
        use_cpu_initialization=True,
        add_bias_linear=False,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
    )


@pytest.mark.skipif(not HAS_NEMO, reason="NeMo is not installed")
def test_nemo_trains_the_student_alone(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    with initialize_parallel(device="cpu"):
        teacher = _config(4, 64).configure_model(None)
        (tmp_path / "weights").mkdir()
        # As NeMo saves a model: inside its wrapper.
        dist_checkpointing.save(
            teacher.sharded_state_dict(prefix="module."), str(tmp_path / "weights")
        )
        path = tmp_path / "kd.yaml"
        path.write_text(
            "intermediate_layer_pairs: [[decoder.layers.0, decoder.layers.1]]\nskip_lm_loss: false",
            encoding="utf-8",
        )
        model = slimtron_distill.DistillationGPTModel(
            _config(2, 32), _config(4, 64), str(tmp_path), str(path)
        )
        model.configure_model()
        loaded = dict(model.module.teacher.named_parameters())
        for name, parameter in teacher.named_parameters():
            assert torch.equal(loaded[name], parameter)
            assert not loaded[name].requires_grad

        model.train()
        tokens = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(0))
        batch = {
            "tokens": tokens[:, :-1],
            "labels": tokens[:, 1:],
            "loss_mask": torch.ones(2, 16),
            "position_ids": torch.arange(16).expand(2, 16),
            "attention_mask": torch.ones(1, 1, 16, 16).triu(1).bool(),
        }
        output = model.training_step(batch)
        reduction = model.training_loss_reduction
        reduction.setup(batch)
        loss, count, logged = reduction(output)
        loss.backward()
        assert count == 32
        assert logged["loss_sum_and_ub_size"][0] > loss
        assert all(p.grad is not None for p in model.parameters())
        assert not any(module.training for module in model.module.teacher.modules())

        model.eval()
        assert model.validation_step(batch).shape == (2, 16)
        alone = _config(2, 32).configure_model(None).state_dict()
        assert model.state_dict().keys() == {f"module.{name}" for name in alone}
