"""NeMo 2's Lightning model of a distillation, where NeMo is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import slimtron_distill
from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.conversion import convert, plan_conversion
from slimtron_common.errors import MissingDependencyError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.nemo import (
    build_in_nemo,
    cpu_trainer,
    nemo_on_cpu,
    nemo_test,
    open_in_nemo,
)
from slimtron_distill.__main__ import main


@pytest.mark.skipif(find_spec("nemo") is not None, reason="NeMo is installed")
def test_without_nemo_it_says_what_to_do() -> None:
    with pytest.raises(MissingDependencyError, match="nemo"):
        _ = slimtron_distill.DistillationGPTModel


def test_a_job_writes_for_nemo(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    out = tmp_path / "job"
    assert main(arguments("run", "--export-format", "nemo", "--steps", "3", out=out)) == 0
    assert main(["verify", str(out), "--eval-tokens", "64", "--eval-seq-len", "16"]) == 0
    assert open_checkpoint(f"nemo2:{out}").architecture.hidden_size == 48


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


@nemo_test
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """NeMo 2 checkpoints of a teacher and of a narrower student."""
    folder = tmp_path_factory.mktemp("nemo")
    for name, shape in (("teacher", {}), ("student", {"hidden_size": 48, "num_hidden_layers": 2})):
        write_tiny_model(folder / f"{name}-hf", seed=len(name), **shape)
        source, target = f"hf:{folder / name}-hf", f"nemo2:{folder / name}"
        convert(plan_conversion(source, target, device="cpu"))
    return {name: folder / name for name in ("teacher", "student")}


def _data() -> Any:
    import lightning.pytorch as pl
    from nemo.lightning.pytorch.plugins import MegatronDataSampler
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(299, (64, 17), generator=generator)
    mask = torch.ones(1, 16, 16, dtype=torch.bool).triu(1)
    rows = [
        {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": torch.ones(16),
            "position_ids": torch.arange(16),
            "attention_mask": mask,
        }
        for row in tokens
    ]

    class Data(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.seq_length, self.micro_batch_size, self.global_batch_size = 16, 2, 4
            self.data_sampler = MegatronDataSampler(16, micro_batch_size=2, global_batch_size=4)

        def train_dataloader(self) -> Any:
            return DataLoader(rows)

        val_dataloader = train_dataloader

    return Data()


def _logits(model: Any, context: ParallelContext) -> torch.Tensor:
    found: list[torch.Tensor] = []
    tokens = torch.arange(24).reshape(1, 24)
    forward_only(model, [tokens], context, lambda _, x: found.append(x[..., :300].clone()))
    return found[0]


@nemo_test
def test_under_llm_train(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with nemo_on_cpu():
        from lightning.pytorch.callbacks import LambdaCallback
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from nemo import lightning as nl
        from nemo.collections import llm

        student = build_in_nemo(checkpoints["student"])
        model = slimtron_distill.DistillationGPTModel(
            student.config,
            build_in_nemo(checkpoints["teacher"]).config,
            str(checkpoints["teacher"]),
            # Megatron-Core wants gradients on a GPU where it clips them.
            optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=1e-2, clip_grad=0.0)),
            tokenizer=student.tokenizer,
        )
        losses: list[float] = []

        def keep(trainer: Any, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

        trainer = cpu_trainer(
            {"ddp": DistributedDataParallelConfig(average_in_collective=False)},
            max_steps=8,
            limit_val_batches=1,
            val_check_interval=8,
            log_every_n_steps=1,
            callbacks=[
                LambdaCallback(
                    on_train_start=lambda *_: model_parallel_cuda_manual_seed(0),
                    on_train_batch_end=keep,
                )
            ],
        )
        llm.train(
            model,
            _data(),
            trainer,
            log=nl.NeMoLogger(
                log_dir=str(tmp_path / "logs"),
                use_datetime_version=False,
                ckpt=nl.ModelCheckpoint(save_last=True, save_top_k=0),
            ),
            resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(checkpoints["student"]))),
        )
        assert len(losses) == 8
        assert losses[-1] < 0.8 * losses[0]
        context = ParallelContext.from_megatron(device=torch.device("cpu"))
        trained = _logits(model.module.eval(), context)
    (saved,) = (tmp_path / "logs").glob("**/*-last")
    with nemo_on_cpu():
        again, _ = open_in_nemo(saved)
        assert type(again) is type(student)
        context = ParallelContext.from_megatron(device=torch.device("cpu"))
        torch.testing.assert_close(_logits(again, context), trained, rtol=0, atol=1e-5)
    opened = open_checkpoint(f"nemo2:{saved}")
    with initialize_parallel(device="cpu") as context:
        plain = build_model(opened.architecture, context, dtype=torch.float32)
        opened.load(plain, context)
        torch.testing.assert_close(_logits(plain, context), trained, rtol=0, atol=1e-5)
