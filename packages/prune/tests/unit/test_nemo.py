"""Pruning with NeMo 2's own objects, where NeMo is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.conversion import convert, plan_conversion
from slimtron_common.errors import ConfigError
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelContext, forward_only, initialize_parallel
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.nemo import (
    nemo_on_cpu,
    nemo_test,
    open_in_nemo,
    train_step,
)
from slimtron_prune import PruningConfig, prune_language_model, save_pruned_model
from slimtron_prune.__main__ import main

WIDTH = PruningConfig(64, 48, 2, 2, target_num_layers=3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NeMo 2 checkpoint of a Llama of four layers."""
    folder = tmp_path_factory.mktemp("nemo")
    write_tiny_model(folder / "hf")
    convert(plan_conversion(f"hf:{folder / 'hf'}", f"nemo2:{folder / 'nemo'}", device="cpu"))
    return folder / "nemo"


def mock_data() -> Any:
    from nemo.collections import llm

    class Tokenizer:
        vocab_size = 299

    return llm.MockDataModule(
        seq_length=16,
        tokenizer=Tokenizer(),
        micro_batch_size=2,
        global_batch_size=2,
        num_workers=0,
        pin_memory=False,
    )


def read_batches(data: Any, count: int) -> list[torch.Tensor]:
    """The tokens that NeMo's training would see first."""
    data.setup()
    rows = [data._train_ds[i]["tokens"] for i in range(2 * count)]
    return list(torch.stack(rows).split(2))


def logits(model: Any, context: ParallelContext) -> torch.Tensor:
    found: list[torch.Tensor] = []
    tokens = torch.arange(24).reshape(1, 24)
    forward_only(model, [tokens], context, lambda _, x: found.append(x[..., :300].clone()))
    return found[0]


def plain(checkpoint: Path, context: ParallelContext) -> Any:
    """The same model, opened without NeMo."""
    opened = open_checkpoint(f"nemo2:{checkpoint}")
    model = build_model(opened.architecture, context, dtype=torch.float32)
    opened.load(model, context)
    return model


def test_a_job_writes_for_nemo(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["run", "--model", f"nemo2:{checkpoint}", "--out", str(out), "--drop-layers", "2",
                 "--export-format", "nemo", "--data", "pydoc", "--eval-tokens", "64",
                 "--eval-seq-len", "32", "--device", "cpu"]) == 0  # fmt: skip
    assert main(["verify", str(out)]) == 0
    assert open_checkpoint(f"nemo2:{out}").architecture.num_layers == 3


@nemo_test
@pytest.mark.parametrize("config", [WIDTH, PruningConfig(drop_layers=[2])], ids=["width", "drop"])
def test_nemos_objects(config: PruningConfig, checkpoint: Path, tmp_path: Path) -> None:
    with nemo_on_cpu():
        model, trainer = open_in_nemo(checkpoint, limit_val_batches=3, max_steps=3)
        data = mock_data()
        untouched = dict(vars(data))
        if config.drop_layers is None:
            with pytest.raises(ConfigError, match="trainer"):
                prune_language_model(model, config, data)
            assert prune_language_model(model, config, data, trainer) is model
        else:
            assert prune_language_model(model, config) is model
        # NeMo's function rebinds val_dataloader for good.
        assert vars(data) == untouched
        context = ParallelContext.from_megatron(device=torch.device("cpu"))
        other = plain(checkpoint, context)
        prune_language_model(other, config, read_batches(mock_data(), 3))
        assert model.config.num_layers == other.config.num_layers == 3
        assert model.config.hidden_size == other.config.hidden_size
        found = logits(model, context)
        torch.testing.assert_close(found, logits(other, context), rtol=0, atol=1e-5)

        save_pruned_model(trainer, tmp_path / "pruned")
        save_pruned_model(model, tmp_path / "own", export_format="nemo")
    for path in (tmp_path / "pruned", tmp_path / "own"):
        with nemo_on_cpu():
            again, _ = open_in_nemo(path)
            assert type(again) is type(model)
            assert again.config.hidden_size == model.config.hidden_size
            torch.testing.assert_close(logits(again, context), found, rtol=0, atol=1e-5)
            before, after = train_step(again)
            assert after < before
    with initialize_parallel(device="cpu") as context:
        torch.testing.assert_close(
            logits(plain(tmp_path / "pruned", context), context), found, rtol=0, atol=1e-5
        )
    assert len(open_checkpoint(f"nemo2:{tmp_path / 'pruned'}").tokenizer()) == 300
    assert np.isfinite(found.numpy()).all()
