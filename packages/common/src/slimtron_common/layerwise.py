"""Run text through a model of which one layer at a time is in memory.

A layer is built and loaded as a pipeline stage of its own; the first has the embedding, the last
the final norm and the output layer. All of the text goes through a layer before the next one takes
its place, so that a pass reads every weight once. In between the hidden states lie on disk, and a
pass that was cut short goes on from them.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slimtron_common.evaluation.evaluate import rank_key
from slimtron_common.evaluation.reference import ReferenceReader, ReferenceWriter
from slimtron_common.models import Architecture
from slimtron_common.parallel.context import ParallelContext
from slimtron_common.parallel.schedule import LayeredModel, OnLogits, model_inputs
from slimtron_common.progress import track

__all__ = ["LayerwiseModel", "LayerwisePass", "hidden_state_bytes", "quick_collection"]

_CONTENTS = "hidden states"


def hidden_state_bytes(num_tokens: int, architecture: Architecture, dtype: torch.dtype) -> int:
    """Disk space that a pass takes at most, over all data-parallel processes.

    These are the states in front of a layer and those behind it.
    """
    return 2 * num_tokens * architecture.hidden_size * dtype.itemsize


class LayerwisePass:
    """One pass of text through the layers of a model.

    Args:
        directory: Where hidden states lie, on storage that all processes share; what an
            interrupted pass of the same text left there is used.
        batches: This data-parallel rank's token ids, each ``[b, s]``.
        context: This process's place, without pipeline parallelism.
        num_layers: Layers of the model.
    """

    def __init__(
        self,
        directory: Path,
        batches: Sequence[Tensor],
        context: ParallelContext,
        *,
        num_layers: int,
    ) -> None:
        self._directory = directory
        self._batches = batches
        self._context = context
        self._num_layers = num_layers
        self._key = rank_key(context)

    @property
    def next_layer(self) -> int:
        """The layer that the pass goes on with; the same on every process."""
        known = (n for n in range(1, self._num_layers) if self._index(n).is_file())
        found = [0] * self._context.world_size
        dist.all_gather_object(found, max(known, default=0))
        return min(found)

    @torch.no_grad()
    def run(self, model: Any, layer: int, on_logits: OnLogits | None = None) -> None:
        """Runs all of the text through one layer, from the states that the one before left.

        Doing it again gives the same: the states in front of the layer stay until the next one
        begins.

        Args:
            model: The layer, as of ``build_model(..., layer=layer)``.
            layer: Its number, from 0.
            on_logits: What the last layer calls, as in ``forward_only``.
        """
        context = self._context
        self._forget(range(layer))
        states = None
        if layer > 0:
            states = ReferenceReader(self._states(layer), self._key, contents=_CONTENTS)
        with contextlib.ExitStack() as stack:
            receive = on_logits
            if layer + 1 < self._num_layers:
                writer = stack.enter_context(
                    ReferenceWriter(self._states(layer + 1), self._key, contents=_CONTENTS)
                )

                def receive(_: int, output: Tensor) -> None:
                    writer.append(output)

            for index, tokens in enumerate(self._batches):
                before = None if states is None else states.read(index).to(context.device)
                model.set_input_tensor(before)
                output = model(*model_inputs(tokens.to(context.device), context), None)
                if receive is not None:
                    receive(index, output)
            model.set_input_tensor(None)
        # Nobody forgets what another may have to begin with.
        context.barrier()

    def close(self) -> None:
        """Removes the states; every process calls it."""
        self._context.barrier()
        if self._context.is_main:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._context.barrier()

    def _forget(self, layers: range) -> None:
        for layer in layers:
            for path in self._states(layer).glob(f"{self._key}.*"):
                path.unlink()

    def _states(self, layer: int) -> Path:
        return self._directory / f"{layer:05d}"

    def _index(self, layer: int) -> Path:
        return self._states(layer) / f"{self._key}.json"


class LayerwiseModel(LayeredModel):
    """A model whose layers are loaded one after the other, each time that it runs.

    Args:
        load: Returns one layer, from 0, as a pipeline stage of its own.
        num_layers: How many there are.
        directory: Where hidden states lie while text runs, as for ``LayerwisePass``.
    """

    def __init__(
        self, load: Callable[[int], nn.Module], *, num_layers: int, directory: Path
    ) -> None:
        self._load = load
        self._num_layers = num_layers
        self._directory = directory

    def layers(self) -> Iterator[nn.Module]:
        for layer in range(self._num_layers):
            yield self._load(layer)

    def forward_only(
        self,
        batches: Sequence[Tensor],
        context: ParallelContext,
        on_logits: OnLogits | None = None,
    ) -> None:
        text = LayerwisePass(self._directory, batches, context, num_layers=self._num_layers)
        for layer in track(range(text.next_layer, self._num_layers), description="layers"):
            text.run(self._load(layer), layer, on_logits)
        text.close()


@contextlib.contextmanager
def quick_collection() -> Iterator[None]:
    """Keeps the garbage collector from looking at what is there already.

    A layer with quantizers holds itself in cycles, so it runs once a layer; to look through the
    imported libraries takes it about half a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
