"""Rows that hold several histories: what comes out where each is walked alone, and which of them may change what."""

import numpy as np

BY_POSITION = ("x", "dt", "B", "C")


def marked(shape, *rows):
    """Bool `starts` of a shape [b, l], true at the positions listed for each row."""
    starts = np.zeros(shape, bool)
    for row, positions in zip(starts, rows, strict=True):
        row[list(positions)] = True
    return starts


def histories(starts, lengths=None):
    """Yields (row, first position, position after the last, real positions, whether it follows what was before)."""
    length = starts.shape[1]
    for row, begins in enumerate(starts):
        real = length if lengths is None else lengths[row]
        firsts = [t for t in range(real) if begins[t] or t == 0] or [0]
        for first, after in zip(firsts, [*firsts[1:], length], strict=True):
            yield row, first, after, min(after, real) - first, first == 0 and not (real and begins[0])


def alone(sequential, arrays, starts, lengths, dy, dstate):
    """Walks each history by itself, by a float64 `sequential(arrays, lengths, dy, dstate)`.

    Returns y, the final state, and the gradient by every input.
    """
    y, state = np.zeros_like(dy), np.zeros_like(dstate)
    gradients = {name: np.zeros(a.shape) for name, a in arrays.items()}
    for row, first, after, real, follows in histories(starts, lengths):
        rows = slice(row, row + 1)
        part = {name: a[rows, first:after] if name in BY_POSITION else a for name, a in arrays.items()}
        initial = part.pop("initial_state", None)
        if follows and initial is not None:
            part["initial_state"] = initial[rows]
        weight = dstate[rows] * (after == dy.shape[1])
        y[rows, first:after], final, own = sequential(part, (real,), dy[rows, first:after], weight)
        if after == dy.shape[1]:
            state[rows] = final
        for name, gradient in own.items():
            at = (rows, slice(first, after)) if name in BY_POSITION else rows if name == "initial_state" else ...
            gradients[name][at] += gradient
    return y, state, gradients


def unlike(arrays, row, first, after, **factors):
    """Arrays with other values at a history's positions: turned around, and times a factor where one is named."""
    changed = {}
    for name, a in arrays.items():
        if name not in BY_POSITION and name != "dy":
            changed[name] = a
            continue
        changed[name] = np.array(a)
        changed[name][row, first:after] = -a[row, first:after] * factors.get(name, 1)
    return changed


def same_bits_outside(actual, expected, row, first, after):
    """Results by position, {name: [b, l, ..]}, differ only at a history's positions, and do differ there."""
    for name, a in actual.items():
        a, b = np.array(a), np.array(expected[name])
        inside = a[row, first:after], b[row, first:after]
        assert not np.array_equal(*inside), f"{name} does not depend on its own history"
        a[row, first:after] = b[row, first:after] = 0
        np.testing.assert_array_equal(a, b, err_msg=name)
