"""Student and teacher as one model, in one process."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from slimtron_common.checkpoint import open_checkpoint
from slimtron_common.models.megatron import build_chunks
from slimtron_common.parallel import ParallelContext, initialize_parallel, unwrap_model
from slimtron_common.testing import write_tiny_model
from slimtron_distill import DistillationConfig, distillation_task, load_teacher
from slimtron_distill.losses import LogitLossSettings
from slimtron_distill.model.task import DistillationTask

VOCAB = 300
PAIR = ("decoder.layers.0", "decoder.layers.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "student", num_hidden_layers=2, hidden_size=32, tokenizer=False)
    write_tiny_model(folder / "teacher", num_hidden_layers=4, seed=1, tokenizer=False)
    return folder


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    with initialize_parallel(device="cpu") as context:
        yield context


def _load(path: Path, context: ParallelContext) -> Any:
    checkpoint = open_checkpoint(f"hf:{path}")
    (model,) = build_chunks(checkpoint.architecture, context, dtype=torch.float32)
    checkpoint.load(model, context)
    return model


def _task(
    folder: Path, context: ParallelContext, *, teacher: str = "teacher", **fields: Any
) -> DistillationTask:
    return distillation_task(
        [_load(folder / "student", context)],
        [_load(folder / teacher, context)],
        DistillationConfig(**fields),
        context,
        vocab_size=VOCAB,
    )


def _batch(size: int = 2) -> dict[str, Tensor]:
    tokens = torch.randint(VOCAB, (size, 17), generator=torch.Generator().manual_seed(0))
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(size, 16),
    }


def _step(task: DistillationTask, batch: dict[str, Tensor]) -> dict[str, float]:
    output, loss_function = task.forward_step(iter([batch]), task.chunks[0])
    loss, _, parts = loss_function(output)
    loss.backward()
    return {name: value[0].item() for name, value in task.collect([parts]).items()}


def test_to_megatron_it_is_the_student(folder: Path, context: ParallelContext) -> None:
    task = _task(folder, context, intermediate_layer_pairs=[PAIR])
    (model,), (student,) = task.chunks, task.student_chunks
    assert unwrap_model(model) is student
    assert type(student) is GPTModel
    assert model.state_dict().keys() == student.state_dict().keys()
    assert model.sharded_state_dict().keys() == student.sharded_state_dict().keys()
    names = {name for name, _ in model.named_parameters()}
    own = {f"module.{name}" for name, _ in student.named_parameters()}
    assert names == own | {"matches.0.projection.weight"}
    changed = {name: value + 1 for name, value in student.state_dict().items() if value is not None}
    model.load_state_dict(changed, strict=False)
    weight = "decoder.final_layernorm.weight"
    assert torch.equal(student.state_dict()[weight], changed[weight])


def test_nothing_reaches_the_teacher(folder: Path, context: ParallelContext) -> None:
    model: Any = _task(folder, context).chunks[0]
    model.train()
    model.requires_grad_(True)
    model.double()
    assert not any(module.training for module in model.teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert {p.dtype for p in model.teacher.parameters()} == {torch.float32}


def test_in_eval_mode_the_student_runs_alone(folder: Path, context: ParallelContext) -> None:
    task = _task(folder, context, intermediate_layer_pairs=[PAIR])
    (model,), (student,) = task.chunks, task.student_chunks
    model.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    model.eval()
    batch = _batch()
    output, loss_function = task.forward_step(iter([batch]), model)
    positions = torch.arange(16).expand(2, 16)
    torch.testing.assert_close(output, student(batch["tokens"], positions, None))
    loss, count, parts = loss_function(output)
    reference = torch.nn.functional.cross_entropy(
        output[..., :VOCAB].flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, reference)
    collected = task.collect([parts])
    assert collected.keys() == {"lm_loss", "loss"}
    assert collected["loss"].tolist() == pytest.approx([loss.item(), count.item()])


@pytest.mark.parametrize(
    "criterion",
    [
        LogitLossSettings(),
        LogitLossSettings(kind="reverse_kl", temperature=2.0),
        LogitLossSettings(kind="jsd"),
        LogitLossSettings(top_k=8),
    ],
    ids=lambda settings: f"{settings.kind}-{settings.top_k}",
)
@pytest.mark.parametrize("intermediate", ["cosine", "mse"])
def test_a_student_that_is_its_teacher_stays(
    criterion: LogitLossSettings, intermediate: Any, folder: Path, context: ParallelContext
) -> None:
    task = _task(
        folder,
        context,
        teacher="student",
        criterion=criterion,
        intermediate_layer_pairs=[("decoder.layers.0", "decoder.layers.0")],
        intermediate_criterion=intermediate,
        loss_balancer="dynamic",
    )
    for _ in range(2):
        losses = _step(task, _batch())
        task.observe(losses)
        assert set(losses.values()) == {0.0}
    gradients = [p.grad for p in task.student_chunks[0].parameters()]
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


def test_masked_tokens_count_nothing(folder: Path, context: ParallelContext) -> None:
    task = _task(folder, context, intermediate_layer_pairs=[PAIR], skip_lm_loss=False)
    batch = _batch()
    batch["loss_mask"] = torch.zeros(2, 16)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    losses = _step(task, batch)
    assert set(losses.values()) == {0.0}
    for parameter in task.chunks[0].parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_hidden_loss_follows_the_gradient_scale(folder: Path, context: ParallelContext) -> None:
    gradients = []
    for scale in (None, lambda loss: loss * 8):
        task = _task(folder, context, intermediate_layer_pairs=[PAIR])
        model: Any = task.chunks[0]
        model.config.grad_scale_func = scale
        output, loss_function = task.forward_step(iter([_batch()]), model)
        loss, _, _ = loss_function(output)
        (loss if scale is None else scale(loss)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, plain * 8)


def test_what_cannot_be_compared_is_refused(folder: Path, context: ParallelContext) -> None:
    from slimtron_common.errors import ConfigError, UnsupportedModelError

    with pytest.raises(ConfigError, match="no such module"):
        _task(folder, context, intermediate_layer_pairs=[("decoder.layers.0.ffn", PAIR[1])])
    task = _task(
        folder, context, intermediate_layer_pairs=[("decoder.layers.0.mlp.linear_fc1", PAIR[1])]
    )
    with pytest.raises(UnsupportedModelError, match="student's module puts out no hidden state"):
        _step(task, _batch())
    student = _load(folder / "student", context)
    student.config.recompute_granularity = "full"
    with pytest.raises(ConfigError, match="computed again"):
        distillation_task(
            [student],
            [_load(folder / "teacher", context)],
            DistillationConfig(intermediate_layer_pairs=[PAIR]),  # type: ignore[arg-type]
            context,
        )


def test_modules_inside_layers_are_compared(folder: Path, context: ParallelContext) -> None:
    pairs = [
        ("embedding", "embedding"),
        ("decoder.layers.1.self_attention", "decoder.layers.3.mlp"),
        ("decoder.final_layernorm", "decoder.final_layernorm"),
    ]
    losses = _step(_task(folder, context, intermediate_layer_pairs=pairs), _batch())
    values = [losses[f"intermediate_loss/{a}-{b}"] for a, b in pairs]
    assert all(value > 0 for value in values)
    assert losses["intermediate_loss"] == pytest.approx(sum(values) / 3)


@pytest.mark.parametrize("vocab_size", [280, 320])
def test_a_teacher_takes_the_students_vocabulary(
    vocab_size: int, folder: Path, context: ParallelContext
) -> None:
    checkpoint = open_checkpoint(f"hf:{folder}/teacher")
    whole = _load(folder / "teacher", context)
    (fitted,) = load_teacher(checkpoint, context, dtype=torch.float32, vocab_size=vocab_size)
    assert checkpoint.architecture.vocab_size == VOCAB
    tokens, positions = torch.arange(16)[None], torch.arange(16)[None]
    logits, expected = (model(tokens, positions, None) for model in (fitted, whole))
    assert logits.shape[-1] == vocab_size
    shared = min(VOCAB, vocab_size)
    torch.testing.assert_close(logits[..., :shared], expected[..., :shared])


def test_loading_leaves_no_buffer(folder: Path, context: ParallelContext) -> None:
    read: list[weakref.ref[Tensor]] = []
    checkpoint: Any = copy.copy(open_checkpoint(f"hf:{folder}/teacher"))
    original = checkpoint.tensors.read

    def spy(name: str) -> Tensor:
        tensor = original(name)
        read.append(weakref.ref(tensor))
        return tensor

    checkpoint.tensors.read = spy
    chunks = load_teacher(checkpoint, context, dtype=torch.float32, vocab_size=VOCAB)
    gc.collect()
    assert chunks
    assert read
    assert not any(reference() is not None for reference in read)
    assert not checkpoint.tensors._open
