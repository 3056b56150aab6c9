"""Passes that begin in the middle of a model, where nothing before has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

__all__ = ["Replay"]


class Replay:
    """The hidden states in front of one layer, from which passes go on.

    Holds the input of one layer alone; whoever goes through a model from front to back computes
    half of it in the mean.

    Args:
        model: The bare Megatron-Core model; ``move_to`` sees it as it is to be replayed.
        run: Runs the text through the model, in the same batches each time.
    """

    def __init__(self, model: Any, run: Callable[[], None]) -> None:
        self._layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        self._run = run
        self._begin: int | None = None
        self._states: list[Tensor] = []

    def move_to(self, layer: int) -> None:
        """Keeps the input of ``layer``, at or behind where passes begin now.

        All processes call it; the one that has the layer holds the states.
        """
        if layer == self._begin:
            return
        states: list[Tensor] = []

        def keep(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            states.append(kwargs["hidden_states"].clone())

        with self.active(), ExitStack() as stack:
            if layer in self._layers:
                hook = self._layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
                stack.callback(hook.remove)
            self._run()
        self._begin, self._states = layer, states

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, one run of the text begins at the layer."""
        if self._begin is None:
            yield
            return
        states = iter(self._states)

        def replace(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "hidden_states": next(states)}

        with ExitStack() as stack:
            for number, layer in self._layers.items():
                if number < self._begin:
                    layer.forward = _pass_on
                    stack.callback(layer.__delattr__, "forward")
            if self._begin in self._layers:
                begin = self._layers[self._begin]
                stack.callback(begin.register_forward_pre_hook(replace, with_kwargs=True).remove)
            yield


def _pass_on(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """A layer's signature, and none of its work."""
    return hidden_states, None
