"""Scales of every kind are cut and gathered with their weights."""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from safetensors.torch import load_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.checkpoint.writer import collective_directory
from slimtron_common.models.megatron import build_model
from slimtron_common.parallel import ParallelConfig, initialize_parallel
from slimtron_common.testing import run_ranks, write_tiny_model
from slimtron_common.testing.versions import needs
from slimtron_quant import calibration_loop
from slimtron_quant.export.kinds import write_export

pytestmark = needs("nvidia-modelopt", "0.47", what="backends for quantizers")
CONFIGS = {
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "block_fp8": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    # One block of a row-parallel layer's input channels in each of two processes.
    "int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
}


def _export_all(rank: int, world_size: int, model_dir: Path, out: Path) -> None:
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend

    # ModelOpt computes these on a GPU alone. Here it is enough that all blocks are rounded alike.
    register_quant_backend("blocks", _rounded)
    checkpoint = open_checkpoint(f"hf:{model_dir}")
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(3))
    layout = ParallelConfig(tensor_parallel_size=world_size)
    with initialize_parallel(layout, device="cpu") as context:
        for name, config_name in CONFIGS.items():
            model = build_model(checkpoint.architecture, context, dtype=torch.float32)
            checkpoint.load(model, context)
            config = copy.deepcopy(getattr(mtq, config_name))
            for entry in config["quant_cfg"]:
                cfg = entry.get("cfg")
                if isinstance(cfg, dict) and "scale_bits" in (cfg.get("block_sizes") or {}):
                    cfg["backend"] = "blocks"
            config["quant_cfg"].append({"quantizer_name": "*output_layer*", "enable": False})
            mtq.quantize(model, {**config, "algorithm": None})
            mtq.calibrate(model, "max", calibration_loop([tokens], context))
            with collective_directory(out / name, context) as directory:
                write_export(
                    "hf", directory, model, checkpoint.architecture, context, dtype=torch.float32
                )


def _rounded(x, quantizer):  # type: ignore[no-untyped-def]
    from slimtron_quant.formats import FORMATS

    if quantizer.block_sizes["scale_bits"] == (8, 0):
        fmt, scale = FORMATS["mxfp8" if quantizer.num_bits == (4, 3) else "mxfp4"], None
    else:
        fmt, scale = FORMATS["nvfp4"], quantizer._amax.float() / (6 * 448)
    return fmt.quantize_activation(x, scale)


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    model = write_tiny_model(
        tmp_path / "model",
        tokenizer=False,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=128,
    )
    for folder, world_size in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        run_ranks(_export_all, world_size, model, tmp_path / folder)
    for name in CONFIGS:
        expected = load_file(tmp_path / "one" / name / "model.safetensors")
        found = load_file(tmp_path / "two" / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            where = f"{name} {key}"
            assert found[key].dtype == tensor.dtype, where
            assert found[key].shape == tensor.shape, where
            if key.endswith("input_scale"):
                # Partial sums are added in another order.
                torch.testing.assert_close(found[key], tensor, rtol=0.05, atol=0)
            else:
                assert torch.equal(found[key].double(), tensor.double()), where
        for file in ("config.json", "hf_quant_config.json"):
            one, two = (tmp_path / folder / name / file for folder in ("one", "two"))
            assert one.read_text() == two.read_text()
