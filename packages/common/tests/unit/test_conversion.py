from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from slimtron_common import conversion, memory
from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.conversion import convert, plan_conversion
from slimtron_common.errors import (
    CheckpointError,
    ConfigError,
    ParallelismError,
    VerificationError,
)
from slimtron_common.manifest import verify_manifest
from slimtron_common.parallel import ParallelConfig
from slimtron_common.testing import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2")


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "source"))


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_there_and_back_is_the_same_model(tiny: Path, tmp_path: Path) -> None:
    there = convert(plan_conversion(f"hf:{tiny}", f"megatron:{tmp_path / 'there'}"))
    back = convert(plan_conversion(f"megatron:{tmp_path / 'there'}", f"hf:{tmp_path / 'back'}"))
    for done in (there, back):
        assert (done.difference, done.rounding) == (0.0, 0.0)
        assert done.largest_logit > 1
        assert done.dtype is torch.float32
        verify_manifest(done.path)
    assert there.num_parameters == back.num_parameters
    before, after = (load_file(p / "model.safetensors") for p in (tiny, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = "try: pass"
    ids = [
        transformers.AutoTokenizer.from_pretrained(p)(text)["input_ids"]
        for p in (tiny, tmp_path / "back")
    ]
    assert ids[0] == ids[1]
    assert not dist.is_initialized()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_measured(dtype: str, tiny: Path, tmp_path: Path) -> None:
    done = convert(plan_conversion(f"hf:{tiny}", f"hf:{tmp_path / 'out'}", dtype=dtype))
    assert done.difference == 0.0
    assert done.dtype is getattr(torch, dtype)

    original, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)
        for p in (tiny, tmp_path / "out")
    )
    tokens = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = (original(tokens).logits - rounded(tokens).logits).abs().max().item()
    assert expected > 0
    assert done.rounding == pytest.approx(expected, rel=0.01)
    wider = convert(
        plan_conversion(f"hf:{tmp_path / 'out'}", f"hf:{tmp_path / 'wide'}", dtype="float32")
    )
    assert wider.rounding == 0.0
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "wide")]
    assert all(torch.equal(files[0][name].float(), files[1][name]) for name in files[0])


def test_files_that_compute_something_else_are_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = conversion.WRITERS["hf"]

    def write_wrongly(directory: Path, *args: Any, **kwargs: Any) -> None:
        write(directory, *args, **kwargs)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 1
        save_file(tensors, directory / "model.safetensors")

    monkeypatch.setitem(conversion.WRITERS, "hf", write_wrongly)
    target = tmp_path / "out"
    target.mkdir()
    (target / "slimtron.json").touch()
    plan = plan_conversion(f"hf:{source}", f"hf:{target}", dtype="bfloat16", overwrite=True)
    with pytest.raises(VerificationError, match="other logits") as caught:
        convert(plan)
    assert "a difference of" in str(caught.value.found)
    assert caught.value.exit_code == 1
    assert [file.name for file in target.iterdir()] == ["slimtron.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
    assert not dist.is_initialized()


def test_numbers_that_the_type_cannot_hold_are_told(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    plan = plan_conversion(f"hf:{source}", f"hf:{tmp_path / 'out'}", dtype="float16")
    with pytest.raises(VerificationError, match="not finite") as caught:
        convert(plan)
    assert "65504" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    convert(plan_conversion(f"hf:{source}", f"hf:{tmp_path / 'out'}", dtype="bfloat16"))


def test_output_appears_in_place_of_the_old_one(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(CheckpointError, match="exists already") as caught:
        plan_conversion(f"hf:{source}", f"hf:{target}", dtype="bfloat16")
    assert "--overwrite" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="no output of Slimtron"):
        plan_conversion(f"hf:{source}", f"hf:{target}", dtype="bfloat16", overwrite=True)
    (target / "slimtron.json").touch()
    convert(plan_conversion(f"hf:{source}", f"hf:{target}", dtype="bfloat16", overwrite=True))
    assert not (target / "old").exists()
    assert open_checkpoint(f"hf:{target}").dtype is torch.bfloat16


def test_nothing_to_convert_is_refused(source: Path, tmp_path: Path) -> None:
    for dtype in (None, "float32"):
        with pytest.raises(ConfigError, match="nothing to convert"):
            plan_conversion(f"hf:{source}", f"hf:{tmp_path / 'out'}", dtype=dtype)


@pytest.mark.parametrize("target", ["source", "source/../source", "."])
def test_source_is_never_replaced(
    target: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="replace the model"):
        plan_conversion(f"hf:{source}", f"megatron:{tmp_path / target}", overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(ConfigError, match="replace the model"):
        plan_conversion(f"hf:{source}", f"megatron:{link}", overwrite=True)
    assert (source / "model.safetensors").is_file()


def test_layout_is_checked_first(source: Path, tmp_path: Path) -> None:
    target = f"megatron:{tmp_path / 'out'}"
    two = ParallelConfig(tensor_parallel_size=2)
    with pytest.raises(ParallelismError, match="needs 2 processes"):
        plan_conversion(f"hf:{source}", target, parallel=two)
    plan_conversion(f"hf:{source}", target, parallel=two, world_size=2)
    with pytest.raises(ParallelismError, match="key/value heads"):
        plan_conversion(
            f"hf:{source}",
            target,
            parallel=ParallelConfig(tensor_parallel_size=4),
            world_size=4,
        )


def test_full_disk_is_refused_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="too little space"):
        plan_conversion(f"hf:{source}", f"megatron:{tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("target", "dtype", "weights"),
    [
        # The model and what is being written of it.
        ("megatron", "float32", 2 * 4),
        ("hf", "bfloat16", 2 * 2),
        # The source's own type, to measure the rounding, is not held beside the written one.
        ("megatron", "bfloat16", 2 * 2),
    ],
)
def test_memory_that_is_too_small_is_refused_first(
    target: str,
    dtype: str,
    weights: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = open_checkpoint(f"hf:{source}").num_parameters
    needed = round(1.1 * weights * parameters)
    arguments = (f"hf:{source}", f"{target}:{tmp_path / 'out'}")
    monkeypatch.setattr(memory, "available_memory", lambda device: needed)
    plan_conversion(*arguments, dtype=dtype)
    monkeypatch.setattr(memory, "available_memory", lambda device: needed - 1)
    with pytest.raises(ParallelismError, match="does not fit into the memory"):
        plan_conversion(*arguments, dtype=dtype)
    # Half a model in each process.
    halves = ParallelConfig(tensor_parallel_size=2)
    plan_conversion(*arguments, dtype=dtype, parallel=halves, world_size=2)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("source_spec", "target_spec", "where"),
    [("source", "hf:out", "SRC"), ("hf:source", "out", "DST"), ("hf:source", "nemo:out", "DST")],
)
def test_malformed_arguments_are_named(source_spec: str, target_spec: str, where: str) -> None:
    with pytest.raises(ConfigError, match="kind") as caught:
        plan_conversion(source_spec, target_spec)
    assert caught.value.where == where
