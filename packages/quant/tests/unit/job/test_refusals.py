"""A newcomer's mistakes: each refused with exit code 2, a clear message, and nothing written.

None of them may read a weight: that is what makes them cheap on a model of any size.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slimtron_common.checkpoint.huggingface import HuggingFaceCheckpoint
from slimtron_common.testing.models import write_tiny_model
from slimtron_quant.__main__ import main

Arguments = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(HuggingFaceCheckpoint, "load", load)


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str], tuple[str, ...]], None]:
    def check(command: list[str], said: tuple[str, ...]) -> None:
        before = sorted(tmp_path.rglob("*"))
        code = main(command)
        message = capsys.readouterr().err
        assert code == 2, message
        for text in said:
            assert text in message
        assert "Traceback" not in message
        assert sorted(tmp_path.rglob("*")) == before

    return check


FLAGS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "model without kind": (["--model", "smollm2"], ("model", "hf:DIR or megatron:DIR")),
    "unknown kind": (["--model", "gguf:x"], ("hf:DIR",)),
    "missing directory": (["--model", "hf:/no/such/dir"], ("/no/such/dir", "does not exist")),
    "recipe for GPUs": (
        ["--recipe", "nvfp4"],
        ("quantization.algorithm", "nvfp4 on cpu", "fp8, fp8_pc_pt", "doctor"),
    ),
    "override for GPUs": (["--override", "*.mlp=mxfp8"], ("quantization.overrides", "mxfp8")),
    "override that searches": (
        ["--override", "*.mlp=int4_awq"],
        ("quantization.overrides.*.mlp", "searches"),
    ),
    "override that matches nothing": (
        ["--override", "*.linear_fc3=int8"],
        ("quantization.overrides.*.linear_fc3", "did you mean *.linear_fc"),
    ),
    "unknown override": (
        ["--override", "*.mlp=fp9"],
        ("quantization.overrides.*.mlp", "did you mean fp8"),
    ),
    "included pattern matches nothing": (
        ["--include", "nothing"],
        ("quantization.include", "matches no module"),
    ),
    "unknown config of ModelOpt": (
        ["--recipe", "modelopt:FP8_DEFAULT"],
        ("quantization.algorithm", "did you mean FP8_DEFAULT_CFG"),
    ),
    "config that no format holds": (
        ["--recipe", "modelopt:MXFP6_DEFAULT_CFG"],
        ("quantization.algorithm", "no format on disk"),
    ),
    "missing recipe file": (["--recipe", "nothing.yaml"], ("nothing.yaml", "cannot be read")),
    "fixed blocks do not divide": (
        ["--recipe", "block_fp8"],
        ("quantization.algorithm", "blocks do not divide", "linear_qkv"),
    ),
    "unknown recipe": (["--recipe", "fp9"], ("quantization.algorithm", "did you mean fp8")),
    "no recipe": (["--set", "quantization.algorithm=null"], ("quantization.algorithm", "recipes")),
    "misspelt field": (
        ["--set", "quantization.awq_block_sz=64"],
        ("quantization.awq_block_sz", "did you mean awq_block_size"),
    ),
    "wrong type": (["--set", "seed=abc"], ("seed", "abc")),
    "override without value": (["--set", "seed"], ("seed",)),
    "alpha out of range": (["--recipe", "int8_sq", "--sq-alpha", "1.5"], ("sq_alpha", "0 to 1")),
    "block does not divide": (
        ["--recipe", "int4", "--block-size", "48"],
        ("quantization.awq_block_size", "linear_qkv has 64", "auto"),
    ),
    "block not positive": (["--recipe", "int4", "--block-size", "-1"], ("awq_block_size",)),
    "pattern matches nothing": (
        ["--exclude", "*.linear_fc3"],
        ("quantization.exclude", "*.linear_fc3", "linear_fc"),
    ),
    "everything excluded": (["--exclude", "*"], ("quantization.exclude", "nothing is quantized")),
    "too many ranks asked for": (["--tp", "2"], ("torchrun --nproc-per-node 2",)),
    "no negative sizes": (["--tp", "0"], ("tensor_parallel_size", "1 or more")),
    "sequence parallel alone": (
        ["--sequence-parallel"],
        ("sequence_parallel", "tensor_parallel_size"),
    ),
    "experts without processes": (["--ep", "2"], ("torchrun --nproc-per-node 2",)),
    "no expert tokens": (["--min-expert-tokens", "0"], ("quantization.min_expert_tokens",)),
    "context parallelism": (["--set", "parallel.context_parallel_size=2"], ("processes",)),
    "a distributed checkpoint in layers": (
        ["--layerwise", "--export-format", "megatron"],
        ("export.export_format", "hf with --layerwise"),
    ),
    "sensitivity in layers": (
        ["--layerwise", "--bits", "6.5", "--block-size", "16"],
        ("mixed.sensitivity", "sensitivity.json with --layerwise"),
    ),
    "too few tokens": (
        ["--eval-tokens", "3200000"],
        ("pydoc", "tokens"),
    ),
    "ragged evaluation": (["--eval-tokens", "100"], ("evaluation.num_tokens", "multiple")),
    "one-token sequences": (
        ["--eval-tokens", "4", "--eval-seq-len", "1"],
        ("evaluation.seq_length", "2 or more"),
    ),
    "sequences beyond the positions": (
        ["--calib-seq-len", "1024"],
        ("calibration_seq_len", "at most 512"),
    ),
    "two budgets": (["--bits", "5", "--size", "1MB"], ("mixed.bits", "one budget")),
    "budget too small": (
        ["--bits", "4", "--block-size", "auto"],
        ("mixed.bits", "4 bits a weight", "to 16.000 bits a weight"),
    ),
    "size too small": (["--size", "10kB", "--candidates", "fp8,none"], ("mixed.size", "MB to")),
    "budget of the whole model": (
        ["--bits", "16", "--block-size", "auto"],
        ("mixed.bits", "nothing to quantize"),
    ),
    "no size": (["--size", "80"], ("mixed.size", "80MB")),
    "unknown candidate": (
        ["--bits", "6", "--candidates", "fp8,fp9"],
        ("mixed.candidates", "did you mean fp8"),
    ),
    "one candidate": (["--bits", "6", "--candidates", "fp8"], ("mixed.candidates",)),
    "candidates that search": (
        ["--bits", "6", "--candidates", "int4_awq,w4a8_awq"],
        ("mixed.candidates", "only one", "int4_awq, w4a8_awq"),
    ),
    "candidates that do not mix": (
        ["--bits", "9", "--candidates", "int8_sq,fp8"],
        ("mixed.candidates", "smoothquant"),
    ),
    "candidate for GPUs": (
        ["--bits", "6", "--candidates", "nvfp4,fp8"],
        ("mixed.candidates", "nvfp4 on cpu"),
    ),
    "candidate whose blocks do not fit": (
        ["--bits", "6"],
        ("quantization.awq_block_size", "linear_qkv has 64"),
    ),
    "recipe beside a budget": (
        ["--bits", "6", "--recipe", "int8"],
        ("quantization.algorithm", "--candidates"),
    ),
    "override beside a budget": (
        ["--bits", "6", "--override", "*.mlp=int8"],
        ("quantization.overrides", "exclude"),
    ),
    "sensitivities without a budget": (["--sensitivity", "x.json"], ("mixed.sensitivity",)),
    "missing sensitivities": (
        ["--bits", "6", "--block-size", "auto", "--sensitivity", "/no/such.json"],
        ("/no/such.json", "missing"),
    ),
    "missing text": (["--data", "/no/such/text.txt"], ("/no/such/text.txt",)),
    "unknown text": (["--data", "prose"], ("prose",)),
    "KV cache for GPUs": (
        ["--kv-cache", "nvfp4"],
        ("quantization.kv_cache_qformat", "KV cache in nvfp4 on cpu", "fp8", "doctor"),
    ),
    "no recipe and no KV cache": (
        ["--recipe", "none"],
        ("quantization.algorithm", "enable_kv_cache", "convert"),
    ),
    "no recipe to choose layers for": (
        ["--recipe", "none", "--kv-cache", "fp8", "--exclude", "*.linear_fc2"],
        ("quantization.exclude", "no layers to choose"),
    ),
    "export format": (["--set", "export.export_format=trtllm"], ("export_format", "hf")),
    "export type": (["--export-dtype", "int3"], ("export.dtype", "bf16")),
    "compute type": (["--dtype", "float8"], ("dtype", "float8")),
    "no GPU": (["--device", "cuda"], ("device", "doctor")),
    "output's parent missing": (["--out", "/no/such/parent/out"], ("/no/such/parent",)),
    "negative seed": (["--seed", "-1"], ("seed",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str, arguments: Arguments, refused: Callable[..., None]) -> None:
    import torch

    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    flags, said = FLAGS[name]
    refused(arguments("run", *flags), said)


def _model(tiny_model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    return copy


def _edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    config.update(changes)
    (model / "config.json").write_text(json.dumps(config))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda m: (m / "config.json").unlink(), ("config.json", "missing")),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ("config.json",)),
    "other architecture": (
        lambda m: _edit_config(m, model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        ("gpt2", "llama"),
    ),
    "quantized already": (
        lambda m: _edit_config(m, quantization_config={"quant_method": "fp8"}),
        ("already quantized",),
    ),
    "biases": (lambda m: _edit_config(m, mlp_bias=True), ("mlp_bias",)),
    "rope scaling": (
        lambda m: _edit_config(m, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        ("yarn",),
    ),
    "other shapes than announced": (
        lambda m: _edit_config(m, intermediate_size=128),
        ("[96, 64]", "[128, 64]"),
    ),
    "cut-off weights": (lambda m: _truncate(m / "model.safetensors"), ("model.safetensors",)),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("no safetensors file",)),
    "pickled weights": (
        lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
        ("pytorch_model.bin", "could run code"),
    ),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ("tokenizer",)),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), ("tokenizer",)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    arguments: Arguments,
    refused: Callable[..., None],
) -> None:
    spoil, said = CHECKPOINTS[name]
    model = _model(tiny_model, tmp_path)
    spoil(model)
    refused(arguments("run", "--model", f"hf:{model}"), said)


def test_heads_do_not_divide(
    arguments: Arguments, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(arguments("run", "--tp", "3"), ("4 attention heads", "allowed: 1, 2"))


def test_more_stages_than_layers(
    arguments: Arguments, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(arguments("run", "--pp", "4"), ("2 layers", "allowed: 1 to 2"))


def test_another_algorithm_in_layers(
    tmp_path: Path, arguments: Arguments, refused: Callable[..., None]
) -> None:
    recipe = tmp_path / "mse.yaml"
    blocks = "{num_bits: 4, block_sizes: {'-1': 16}}"
    recipe.write_text(f"quant_cfg: {{'*weight_quantizer': {blocks}}}\nalgorithm: mse\n")
    refused(
        arguments("run", "--layerwise", "--recipe", str(recipe)),
        ("quantization.algorithm", "mse", "max, smoothquant, awq_lite with --layerwise"),
    )


def test_more_processes_than_sequences(
    arguments: Arguments, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    refused(arguments("run"), ("evaluation.num_tokens", "6 sequences", "16 or more"))


def test_layouts_that_the_model_does_not_take(
    arguments: Arguments,
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    cut = ("--cp", "2", "--eval-seq-len", "30", "--eval-tokens", "180")
    refused(arguments("run", *cut), ("evaluation.seq_length", "a multiple of 4, such as 32"))
    refused(
        arguments("run", "--layerwise", "--pp", "2"),
        ("parallel.pipeline_parallel_size", "1 with --layerwise"),
    )
    refused(arguments("run", "--ep", "2"), ("expert_parallel_size", "this model is dense"))
    mixture = ("--model", f"hf:{write_tiny_model(tmp_path / 'mixture', 'mixtral')}", "--ep", "2")
    odd = ("--eval-tokens", "160", "--eval-batch-size", "1")
    refused(
        arguments("run", *mixture, *odd),
        ("evaluation.num_tokens", "5 sequences for 2 processes", "a multiple of 2"),
    )
    refused(
        arguments("run", *mixture, "--calib-size", "3"),
        ("quantization.calibration_dataset_size", "3 sequences for 2 processes"),
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(arguments("run", *mixture[:2], "--ep", "3"), ("4 experts", "allowed: 1, 2, 4"))


def test_hybrids(arguments: Arguments, refused: Callable[..., None], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "hybrid", "nemotron_h")
    refused(arguments("run", "--model", f"hf:{model}"), ("knows transformers alone", "M-M*M-"))


TEXTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "not JSON": ("a.jsonl", b'{"text": "x"}\nnonsense\n', ("a.jsonl", "2")),
    "no text field": ("a.jsonl", b'{"body": "x"}\n', ("text", "body")),
    "empty": ("a.txt", b"", ("a.txt",)),
    "not UTF-8": ("a.txt", b"\xff\xfe\xfa" * 99, ("a.txt",)),
    "unknown suffix": ("a.docx", b"x", (".docx",)),
    "corrupt gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-20], ("a.jsonl.gz",)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(
    name: str, tmp_path: Path, arguments: Arguments, refused: Callable[..., None]
) -> None:
    file, content, said = TEXTS[name]
    (tmp_path / file).write_bytes(content)
    refused(arguments("run", "--data", str(tmp_path / file)), said)


def test_output_exists(tmp_path: Path, arguments: Arguments, refused: Callable[..., None]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep me")
    refused(arguments("run"), ("exists already", "--overwrite"))


def test_output_is_a_file(
    tmp_path: Path, arguments: Arguments, refused: Callable[..., None]
) -> None:
    (tmp_path / "out").write_text("keep me")
    refused(arguments("run"), ("is a file",))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_cannot_be_written(
    tmp_path: Path, arguments: Arguments, refused: Callable[..., None]
) -> None:
    tmp_path.chmod(0o500)
    try:
        refused(arguments("run"), ("not writable",))
    finally:
        tmp_path.chmod(0o700)


def test_disk_is_full(
    arguments: Arguments, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    refused(arguments("run"), ("too little space", "GiB"))


def test_memory_is_too_small(
    arguments: Arguments, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimtron_common.memory.available_memory", lambda device: 1000)
    refused(arguments("run"), ("does not fit", "--layerwise", "tensor_parallel_size"))
    refused(arguments("run", "--layerwise"), ("does not fit", "raise tensor_parallel_size"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [", ("job.yaml",)),
        ("- a\n- b\n", ("job.yaml",)),
        ("modle: hf:x\n", ("modle", "did you mean model")),
        ("model: hf:x\nmodel: hf:y\n", ("model",)),
        ("model: hf:x\n", ("export",)),
        ("export: {path: x, formt: hf}\nmodel: hf:x\n", ("export.formt",)),
        ("model: !!python/object/apply:os.system ['touch hacked']\n", ("job.yaml",)),
    ],
)
def test_yaml_files(
    content: str, said: tuple[str, ...], tmp_path: Path, refused: Callable[..., None]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(content)
    refused(["run", str(job)], said)


def test_plan_refuses_the_same(arguments: Arguments, refused: Callable[..., None]) -> None:
    refused(arguments("plan", "--recipe", "int4", "--block-size", "48"), ("awq_block_size",))


def test_an_override_that_is_none(arguments: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments("run", "--override", "int4"))
    assert exit_.value.code == 2
    assert "PATTERN=NAME" in capsys.readouterr().err


def test_plan_shows_what_becomes_of_the_layers(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    flags = ["--override", "*.mlp=int8", "--override", "decoder.layers.1.mlp=none"]
    assert main(arguments("plan", *flags)) == 0
    shown = capsys.readouterr().out
    assert "4 to fp8, 2 to int8, 2 as they are (overridden by decoder.layers.1.mlp)" in shown


def test_plan_shows_what_a_layout_needs(
    arguments: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("plan", "--tp", "2")) == 0
    shown = capsys.readouterr().out
    for text in ("tensor 2", "memory per process", "disk", "6 sequences of 32 tokens"):
        assert text in shown
