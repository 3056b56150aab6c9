"""The whole job on a tiny model, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.manifest import verify_manifest
from slimtron_common.report import read_report
from slimtron_common.testing import write_tiny_model
from slimtron_common.testing.versions import SHARED_EXPERTS
from slimtron_prune.__main__ import main

Arguments = Callable[..., list[str]]

SIZES = (
    *("--hidden-size", "48", "--ffn-hidden-size", "64", "--num-layers", "3"),
    *("--num-attention-heads", "2", "--num-query-groups", "1"),
)


def build(command: str, model: Path, out: Path, *more: str) -> list[str]:
    return [
        *(command, "--model", f"hf:{model}", "--out", str(out), "--data", "pydoc"),
        *("--score-tokens", "128", "--score-seq-len", "32", "--device", "cpu", *more),
    ]


EVALUATION = ("--eval-tokens", "192", "--eval-seq-len", "32")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    more = (*EVALUATION, *SIZES, "--max-perplexity-increase", "1000%")
    assert main(build("run", tiny_model, out, *more)) == 0
    return out


def test_output_is_complete_and_the_work_directory_gone(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"),
        *("report.json", "report.html", "slimtron.json"),
    }
    assert [path.name for path in finished.parent.iterdir()] == ["out"]
    assert verify_manifest(finished).kind == "pruned"


def test_config_says_the_new_truth(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [config[name] for name in sizes] == [48, 64, 3, 2]
    # Neither 48 / 2 nor 64 / 4 of the smaller model.
    assert (config["num_key_value_heads"], config["head_dim"]) == (1, 16)
    assert config["tie_word_embeddings"] is True


def test_transformers_generates(finished: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished)
    model = transformers.AutoModelForCausalLM.from_pretrained(finished)
    prompt = tokenizer("import", return_tensors="pt")["input_ids"]
    generated = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] == prompt.shape[1] + 4


def test_report_compares_before_and_after(finished: Path) -> None:
    report = read_report(finished)
    original, pruned = report.columns
    architecture = open_checkpoint(f"hf:{finished}").architecture
    stored = sum(tensor.numel() for tensor in load_file(finished / "model.safetensors").values())
    assert pruned.metrics["num_parameters"] == stored < original.metrics["num_parameters"]
    assert pruned.metrics["weight_bytes"] == (finished / "model.safetensors").stat().st_size
    # Keys and values of a thousand tokens, in float32.
    assert pruned.metrics["kv_bytes"] == 2 * 3 * architecture.key_value_size * 1000 * 4
    assert pruned.metrics["kl"] > 0 == original.metrics["kl"]
    assert report.facts["Quality gate"] == "passed"
    assert report.facts["Layers dropped"].endswith("(counted from 1)")
    assert [table.title for table in report.tables] == ["Architecture", "Parameters"]
    assert report.tables[1].rows[-1][1] == f"{original.metrics['num_parameters']:,}"
    assert len(report.plots) == 3


def test_a_missed_gate_keeps_the_output(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    more = (*EVALUATION, "--drop-layers", "2,3", "--min-agreement", "100%")
    assert main(build("run", tiny_model, out, *more)) == 3
    assert "of the tokens agree, wanted are 100.00%" in caplog.text
    report = read_report(out)
    assert report.facts["Layers dropped"] == "2, 3 (counted from 1)"
    assert report.facts["Chosen by"] == "the list of layers"
    assert report.facts["Quality gate"].startswith("missed: ")
    before, after = (load_file(p / "model.safetensors") for p in (tiny_model, out))
    for new, old in ((0, 0), (1, 3)):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)])


def test_verify_notices_damage(
    finished: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", str(finished), "--against", f"hf:{tiny_model}", *EVALUATION]
    assert main(command) == 0
    assert f"{finished} is sound" in capsys.readouterr().out
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in finished.iterdir():
        if file.name != "slimtron.json":
            (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(broken), *EVALUATION]) == 1
    assert "holds what is no number" in capsys.readouterr().err
    (finished / "model.safetensors").rename(tmp_path / "weights")
    try:
        assert main(["verify", str(finished)]) == 2
    finally:
        (tmp_path / "weights").rename(finished / "model.safetensors")
    assert main(["verify", str(tmp_path / "none")]) == 2


def test_scores_once_any_number_of_cuts(
    finished: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores"
    # The text begins where the evaluation's of the job ends.
    text = tmp_path / "text.txt"
    text.write_text("A few words of Python, and what they are for. " * 80)
    assert main(build("score", tiny_model, scores, "--data", str(text))) == 0
    assert "least important layers" in capsys.readouterr().out
    assert verify_manifest(scores).kind == "scores"
    assert len(read_report(scores).plots) == 3
    outs = []
    for number, more in enumerate((SIZES, ("--ffn-hidden-size", "32"))):
        outs.append(tmp_path / f"out{number}")
        command = build("run", tiny_model, outs[-1], *EVALUATION, *more, "--scores", str(scores))
        assert main(command) == 0
        assert str(scores) in read_report(outs[-1]).facts["Chosen by"]
    # Its own scores on the same text choose the same.
    own = build("run", tiny_model, tmp_path / "own", *EVALUATION, *SIZES)
    own += ["--data", str(text), "--eval-data", "pydoc"]
    assert main(own) == 0
    weights = [load_file(path / "model.safetensors") for path in (outs[0], tmp_path / "own")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("family", ["mistral", "gemma", "nemotron"])
def test_families(family: str, tmp_path: Path) -> None:
    """transformers' logits are compared by the job itself."""
    model = write_tiny_model(tmp_path / "model", family)
    out = tmp_path / "out"
    assert main(build("run", model, out, *EVALUATION, *SIZES)) == 0
    assert read_report(out).facts["Compared with transformers"].startswith("logits differ by")


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", pytest.param("qwen2_moe", marks=SHARED_EXPERTS)]
)
def test_mixtures_of_experts(family: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", family)
    out = tmp_path / "out"
    sizes = ["--num-moe-experts", "3", "--moe-ffn-hidden-size", "24", "--hidden-size", "48"]
    if family == "qwen2_moe":
        sizes += ["--moe-shared-expert-intermediate-size", "32"]
    assert main(build("run", model, out, *EVALUATION, *sizes)) == 0
    report = read_report(out)
    assert report.facts["Compared with transformers"].startswith("logits differ by")
    assert ("experts", 4, 3) in report.tables[0].rows
    shared = ("width of the shared expert", 48, 32)
    assert (shared in report.tables[0].rows) == (family == "qwen2_moe")


def test_hybrids(tmp_path: Path) -> None:
    """Pruned in every dimension, from a Hugging Face directory and from a Megatron checkpoint."""
    model = write_tiny_model(tmp_path / "model", "nemotron_h")
    hf, dist, again = (tmp_path / name for name in ("hf", "dist", "again"))
    sizes = [
        *("--mamba-num-heads", "6", "--mamba-head-dim", "8", "--hidden-size", "48"),
        *("--ffn-hidden-size", "64", "--num-attention-heads", "2", "--num-query-groups", "2"),
    ]
    assert main(build("run", model, hf, *EVALUATION, *sizes, "--num-layers", "5")) == 0
    report = read_report(hf)
    assert report.facts["Compared with transformers"].startswith("logits differ by")
    assert {("Mamba heads", 8, 6), ("Mamba head width", 16, 8)} <= set(report.tables[0].rows)
    pattern = json.loads((hf / "config.json").read_text())["hybrid_override_pattern"]
    assert report.facts["Kinds of layers"] == f"M-M*M- before, {pattern} now"
    drop = ["--drop-layers", "1,4", "--export-format", "megatron"]
    assert main(build("run", model, dist, *EVALUATION, *drop)) == 0
    assert json.loads((dist / "config.json").read_text())["hybrid_override_pattern"] == "-MM-"
    arguments = build("run", model, again, *EVALUATION, "--mamba-num-heads", "4")
    arguments[arguments.index("--model") + 1] = f"megatron:{dist}"
    assert main(arguments) == 0
    assert json.loads((again / "config.json").read_text())["mamba_num_heads"] == 4
    assert main(["verify", str(again)]) == 0


def test_what_a_hybrid_has_in_float32_stays_so(tmp_path: Path) -> None:
    """The decay of Mamba heads beside weights in bfloat16, through both kinds of checkpoints."""
    model = write_tiny_model(tmp_path / "model", "nemotron_h", dtype="bfloat16")
    tensors = load_file(model / "model.safetensors")
    name = "backbone.layers.2.mixer.A_log"
    # What bfloat16 would round.
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    dist, again = tmp_path / "dist", tmp_path / "again"
    more = (*EVALUATION, "--dtype", "bfloat16", "--drop-layers", "1")
    assert main(build("run", model, dist, *more, "--export-format", "megatron")) == 0
    arguments = build("run", model, again, *more)
    arguments[arguments.index("--model") + 1] = f"megatron:{dist}"
    assert main(arguments) == 0
    found = load_file(again / "model.safetensors")["backbone.layers.0.mixer.A_log"]
    assert torch.equal(found, tensors[name])


def test_search_for_a_budget(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--target-params", "110K", "--candidates", "3", "--bound", "num_layers=3:4")
    assert main(build("run", tiny_model, out, *EVALUATION, *more)) == 0
    report = read_report(out)
    assert report.columns[1].metrics["num_parameters"] <= 110_000
    assert report.facts["Budget"] == "110,000 parameters"
    candidates = report.tables[-1]
    assert len(candidates.rows) == 3
    losses = [row[-1] for row in candidates.rows]
    assert losses == sorted(losses)  # type: ignore[type-var]
    assert all(row[0] in (3, 4) for row in candidates.rows)
    assert report.plots[0].title == "Loss against cost"


def test_heads_need_not_divide_the_hidden_size(tmp_path: Path) -> None:
    """transformers' Llama refuses such a config; the same model goes by another name."""
    model = write_tiny_model(tmp_path / "model", hidden_size=96, num_attention_heads=6)
    out = tmp_path / "out"
    assert main(build("run", model, out, *EVALUATION, "--hidden-size", "64")) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "mistral"
    assert read_report(out).facts["Compared with transformers"].startswith("logits differ by")


def test_plan_runs_nothing(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("plan", *SIZES)) == 0
    assert "This job can run" in capsys.readouterr().out
    assert main(arguments("plan", "--target-ratio", "0.7", "--pp", "2")) == 0
    assert "the best shape below" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
