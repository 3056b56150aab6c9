from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.testing import write_tiny_model
from slimtron_quant.formats import FORMATS
from slimtron_quant.formats.alignment import unfit_layers

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


@pytest.fixture
def unfit(tmp_path: Path) -> Any:
    def ask(name: str, *, tp: int = 1, block_size: int | None = None, **shape: int) -> set[str]:
        write_tiny_model(tmp_path / "model", tokenizer=False, **{**SHAPE, **shape})
        architecture = open_checkpoint(f"hf:{tmp_path / 'model'}").architecture
        found = unfit_layers(
            FORMATS[name], architecture, block_size=block_size, tensor_parallel_size=tp
        )
        assert all("blocks of" in reason or "pairs" in reason for reason in found.values())
        assert {layer.split(".")[2] for layer in found} in ({"0", "1"}, set())
        return {layer.split(".", 3)[3] for layer in found}

    return ask


@pytest.mark.parametrize("name", FORMATS)
def test_whole_blocks_fit(name: str, unfit: Any) -> None:
    assert unfit(name, block_size=128) == set()


def test_blocks_of_two_dimensions(unfit: Any) -> None:
    qkv, proj = "self_attention.linear_qkv", "self_attention.linear_proj"
    fc1, fc2 = "mlp.linear_fc1", "mlp.linear_fc2"
    assert unfit("block_fp8", hidden_size=192) == {qkv, proj, fc1, fc2}
    # Queries, keys and values take turns, head by head: a block would mix them.
    assert unfit("block_fp8", head_dim=64) == {qkv}
    assert unfit("block_fp8", intermediate_size=320) == {fc1, fc2}
    assert unfit("block_fp8", tp=2, intermediate_size=384) == {fc1, fc2}
    assert unfit("block_fp8", tp=2, num_attention_heads=2, head_dim=128) == set()


def test_blocks_of_input_channels(unfit: Any) -> None:
    assert unfit("int4", block_size=128, intermediate_size=320) == {"mlp.linear_fc2"}
    assert unfit("int4", block_size=None) == {
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    }
    assert unfit("mxfp8", tp=4, intermediate_size=320) == {"mlp.linear_fc2"}
    assert unfit("nvfp4", tp=4, intermediate_size=320) == set()
    assert unfit("fp8", tp=4, intermediate_size=321) == set()
