"""The time-aware mask of a model over one history: how much of an event is left at each later one."""

import functools
from typing import Any

import jax
import numpy as np

from tim4rec_jax.models import one_segment, variables
from tim4rec_jax.serving.recommender import History, Recommender


@functools.partial(jax.jit, static_argnames="model")
def _intermediates(params: Any, items: jax.Array, lengths: jax.Array, timestamps: jax.Array, *, model: Any) -> Any:
    segments = one_segment(lengths, items.shape[1])
    _, kept = model.apply(variables(params), items, timestamps, segment_ids=segments, mutable=["intermediates"])
    layers = kept.get("intermediates", {})
    found = {
        name: layer["mixer"]["step_size"][0] for name, layer in layers.items() if "step_size" in layer.get("mixer", {})
    }
    return dict(sorted(found.items()))


class TimeMask:
    """L of state space duality, which times the step sizes delta by the gaps between events.

      L[i, j] = exp(A (delta[j + 1] + .. + delta[i])) for j <= i, else 0,   the mean over heads, per layer

    Source: arXiv 2409.16182, section 3.
    """

    def __init__(self, recommender: Recommender) -> None:
        """Looks whether the model has one."""
        self._recommender = recommender
        history = History(np.ones(1, np.int32), np.zeros(1, np.int64))
        inputs = self._inputs(history)
        shapes = {}
        if recommender.model.uses_time:
            model, params = recommender.model, recommender.params
            shapes = jax.eval_shape(functools.partial(_intermediates, model=model), params, *inputs)
        self.exists = bool(shapes)

    def _inputs(self, history: History) -> tuple[np.ndarray, ...]:
        length = self._recommender.max_len
        read = np.array([min(len(history.items), length)], np.int32)
        return self._recommender.inputs([history], read, length)

    def warm(self) -> None:
        """Compiles its one program."""
        self.of(History(np.ones(1, np.int32), np.zeros(1, np.int64)), 1)

    def of(self, history: History, last: int) -> list[np.ndarray]:
        """Returns L over the last events of a history, per layer float32 [n, n] with n <= last; none without a mask."""
        if not self.exists:
            return []
        model, params = self._recommender.model, self._recommender.params
        steps = jax.device_get(_intermediates(params, *self._inputs(history), model=model))
        read = min(len(history.items), self._recommender.max_len)
        masks = []
        for name, delta in steps.items():
            decay = -np.exp(np.asarray(params[name]["mixer"]["A_log"], np.float64))
            sums = np.cumsum(delta[0, :read].astype(np.float64), axis=0)[-last:]
            exponent = decay * (sums[:, None] - sums[None])  # [n, n, h]
            masks.append(np.tril(np.exp(np.minimum(exponent, 0)).mean(axis=2)).astype(np.float32))
        return masks
