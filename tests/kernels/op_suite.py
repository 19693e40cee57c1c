"""What every implementation of a recurrence has to do, whatever the operator; and what tests of all operators share."""

import functools
from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

BATCH = 3
BY_POSITION = ("x", "dt", "B", "C")
PARAMETERS = ("A", "D", "dt_bias")
# Outputs and gradients, as shares of the largest magnitude.
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}


def numbers(rng, *shape):
    """Float64 whose values are float32 numbers, so that both precisions see the same."""
    return rng.normal(size=shape).astype(np.float32).astype(np.float64)


def ids_of(rows, length):
    """Segment ids int32 [b, length] of rows of histories of the given lengths; the rest is padding."""
    ids = np.zeros((len(rows), length), np.int32)
    for row, sizes in zip(ids, rows, strict=True):
        row[: sum(sizes)] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    return ids


def histories(ids):
    """Yields (row, first position, position after the last, real positions, whether it is the row's first)."""
    for row, of_row in enumerate(ids):
        real = int((of_row != 0).sum())
        firsts = [t for t in range(real) if t == 0 or of_row[t] != of_row[t - 1]] or [0]
        for first, after in zip(firsts, [*firsts[1:], len(of_row)], strict=True):
            yield row, first, after, min(after, real) - first, first == 0


def in_dtype(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def assert_near(actual, expected, fraction, name):
    """Every value is within a fraction of the expected array's largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    assert actual.shape == expected.shape, name
    limit = fraction * np.abs(expected).max()
    worst = np.abs(actual - expected).max()
    assert worst <= limit, f"{name}: off by {worst:.2e}, allowed {limit:.2e}"


def assert_all_near(actual, expected, tolerances):
    """y, final state and gradients by name."""
    assert_near(actual[0], expected[0], tolerances[0], "y")
    assert_near(actual[1], expected[1], tolerances[0], "final state")
    assert set(actual[2]) == set(expected[2])
    for name, gradient in actual[2].items():
        # Where every position is a history nothing passes through a decay and its gradient is 0.
        assert_near(gradient, expected[2][name], tolerances[1], f"gradient by {name}")


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
      length: l.
      rows: lengths of the histories of each row, the rest being padding; or None for no segment ids.
      initial: there is an initial state.
      step_scale: standard deviation of the raw steps.
      sizes: what else the operator's shapes depend on.
    """

    length: int
    rows: tuple[tuple[int, ...], ...] | None = None
    initial: bool = False
    step_scale: float = 1.0
    sizes: tuple[int, ...] = ()

    @property
    def ids(self):
        return None if self.rows is None else ids_of(self.rows, self.length)


SMALL = Case(7, initial=True)


class RecurrenceSuite:
    """Tests of an operator with states; a subclass says which.

    Attributes:
      op: the public function.
      implementations: its mapping.
      forms: options of the operator by name: every implementation, and what else changes how it works.
      plain: names of those that take float64.
      kernels: names of those that are kernels.
      slow: names of those that are tested in the exhaustive tier.
      kernel_names: kernels of value and gradient of the last of them.
      cases, packed: by name.
      bad_shapes: (changed shapes, message).
    """

    slow: tuple[str, ...] = ()

    def pytest_generate_tests(self, metafunc):
        whole = [name for name in self.forms if name in self.thorough]
        values = {"form": whole, "any_form": list(self.forms), "plain": self.plain, "kernel": self.kernels}
        values |= {"case": [pytest.param(case, id=name) for name, case in self.cases.items()]}
        for name in ("form", "any_form", "kernel"):
            slow = [pytest.mark.exhaustive]
            values[name] = [pytest.param(f, marks=slow) if f in self.slow else f for f in values[name]]
        own = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[0:1]}
        for name, of_name in values.items():
            if name in metafunc.fixturenames and name not in own:
                metafunc.parametrize(name, of_name)
        if "bad_shape" in metafunc.fixturenames:
            metafunc.parametrize("bad_shape", self.bad_shapes)

    @classmethod
    def run(cls, form, arrays, ids, weights, dtype="float32"):
        """y, final state and gradients by a form, in a dtype."""
        return cls.program(form)(*in_dtype((arrays,), dtype), ids, *in_dtype(weights, dtype))

    @classmethod
    @functools.cache
    def program(cls, form):
        """Jitted (arrays, ids or None, dy, dstate) -> y, final state, gradients."""

        @jax.jit
        def run(arrays, ids, dy, dstate):
            def apply(arrays):
                return cls.op(**arrays, segment_ids=ids, return_final_state=True, **cls.forms[form])

            (y, state), pull = jax.vjp(apply, arrays)
            return y, state, pull((dy.astype(y.dtype), dstate.astype(state.dtype)))[0]

        return run

    @classmethod
    @functools.cache
    def given(cls, case):
        """Arrays, and weights of y and of the final state in the number that is differentiated."""
        arrays = cls.draw(case, np.random.default_rng([case.length, *case.sizes]))
        rng = np.random.default_rng(case.length + 1)
        state = cls.state_shape(case)
        if case.initial:
            arrays["initial_state"] = numbers(rng, *state)
        return arrays, (numbers(rng, *arrays["x"].shape), numbers(rng, *state))

    @classmethod
    def alone(cls, arrays, ids, weights):
        """Goes through each history by itself in float64; returns y, the final state and gradients."""
        dy, dstate = (np.asarray(w, np.float64) for w in weights)
        arrays = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
        if ids is None:
            ids = np.ones(dy.shape[:2], np.int32)
        y, state = np.zeros_like(dy), np.zeros_like(dstate)
        gradients = {name: np.zeros(a.shape) for name, a in arrays.items()}
        for row, first, after, real, is_first in histories(ids):
            rows = slice(row, row + 1)
            part = {name: a[rows, first:after] if name in BY_POSITION else a for name, a in arrays.items()}
            initial = part.pop("initial_state", None)
            if is_first and initial is not None:
                part["initial_state"] = initial[rows]
            weight = dstate[rows] * (after == dy.shape[1])
            y[rows, first:after], final, own = cls.sequential(part, (real,), dy[rows, first:after], weight)
            if after == dy.shape[1]:
                state[rows] = final
            for name, gradient in own.items():
                at = (rows, slice(first, after)) if name in BY_POSITION else rows if name == "initial_state" else ...
                gradients[name][at] += gradient
        return y, state, gradients

    @classmethod
    @functools.cache
    def truth(cls, case):
        arrays, weights = cls.given(case)
        return cls.alone(arrays, case.ids, weights)

    def test_the_suite_knows_every_implementation(self):
        assert {options["implementation"] for options in self.forms.values()} == set(self.implementations)

    def test_values_and_gradients_in_float32(self, case, any_form):
        arrays, weights = self.given(case)
        y, state, gradients = self.run(any_form, arrays, case.ids, weights)
        assert {y.dtype, state.dtype, *(g.dtype for g in gradients.values())} == {jnp.dtype("float32")}
        assert_all_near((y, state, gradients), self.truth(case), TOLERANCES["float32"])

    def test_values_and_gradients_in_float64(self, case, plain, x64):
        arrays, weights = self.given(case)
        y, state, gradients = self.run(plain, arrays, case.ids, weights, "float64")
        assert {y.dtype, state.dtype, *(g.dtype for g in gradients.values())} == {jnp.dtype("float64")}
        assert_all_near((y, state, gradients), self.truth(case), TOLERANCES["float64"])

    def test_any_histories_and_lengths(self, plain):
        case = Case(11, initial=True, sizes=self.small_sizes)
        arrays, weights = self.given(case)
        sizes = st.lists(st.integers(1, 11), max_size=6)

        @hypothesis.settings(max_examples=10, deadline=None)
        @hypothesis.given(rows=st.tuples(sizes, sizes, sizes))
        def check(rows):
            rows = [np.array(row, int) for row in rows]
            ids = ids_of([row[np.cumsum(row) <= case.length] for row in rows], case.length)
            with jax.enable_x64(True):
                actual = self.run(plain, arrays, ids, weights, "float64")
            assert_all_near(actual, self.alone(arrays, ids, weights), TOLERANCES["float64"])

        check()

    @pytest.mark.parametrize("wide", [PARAMETERS + ("initial_state",), ()], ids=["values", "everything"])
    def test_bfloat16_is_close_and_keeps_states_in_float32(self, form, wide):
        case = Case(50, ((13, 1, 26), (50,), (17,)), initial=True, sizes=self.small_sizes)
        arrays, weights = self.given(case)
        arrays = {name: jnp.asarray(a, "float32" if name in wide else jnp.bfloat16) for name, a in arrays.items()}
        weights = in_dtype(in_dtype(weights, jnp.bfloat16), "float32")
        y, state, gradients = self.program(form)(arrays, case.ids, *weights)
        assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
        assert {name: g.dtype for name, g in gradients.items()} == {name: a.dtype for name, a in arrays.items()}
        assert_all_near((y, state, gradients), self.alone(arrays, case.ids, weights), (1e-2, 2e-2))

    def test_bfloat16_sums_are_float32(self, form):
        # 1 added to a bfloat16 sum of 256 leaves it at 256.
        length = 400
        ones = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in self.shapes_of_ones(length).items()}
        dt = jnp.full(ones.pop("dt").shape, np.log(np.e - 1), jnp.float32)
        A = -1e-9 * ones.pop("A").astype(jnp.float32)
        apply = functools.partial(self.op, return_final_state=True, implementation=self.forms[form]["implementation"])
        y, state = jax.jit(apply)(**ones, dt=dt, A=A)
        assert float(state.ravel()[0]) == pytest.approx(length, rel=1e-2)
        assert float(y[0, -1].ravel()[0]) == pytest.approx(length, rel=1e-2)

    def test_extreme_decay_gives_finite_gradients(self, form):
        """Nothing is left of the past: y = delta x (C . B) + D x."""
        arrays, weights = self.given(SMALL)
        arrays = arrays | {"dt": np.full_like(arrays["dt"], 80.0), "dt_bias": np.zeros_like(arrays["dt_bias"])}
        y, state, gradients = self.run(form, arrays, None, weights)
        for array in (y, state, *gradients.values()):
            assert jnp.isfinite(array).all()
        own = np.sum(arrays["B"] * arrays["C"], axis=-1).reshape(*arrays["x"].shape[:2], *[1] * (y.ndim - 2))
        D = arrays["D"].reshape(-1, *[1] * (y.ndim - 3))
        assert_near(y, (80 * own + D) * arrays["x"], 1e-6, "y")

    def test_two_halves_chained_equal_one_pass(self, form):
        case = Case(12, initial=True, sizes=self.small_sizes)
        arrays, weights = self.given(case)

        def part(state, positions):
            sliced = {name: a[:, positions] if name in BY_POSITION else a for name, a in arrays.items()}
            return self.run(form, sliced | {"initial_state": state}, None, (weights[0][:, positions], weights[1]))[:2]

        first, state = part(arrays["initial_state"], slice(0, 6))
        second, state = part(state, slice(6, None))
        assert_near(jnp.concatenate([first, second], axis=1), self.truth(case)[0], 2e-5, "y")
        assert_near(state, self.truth(case)[1], 2e-5, "final state")

    def test_padding_leaves_the_state_as_it_is(self, form):
        """Rows of padding alone and rows cut short, whatever their padding holds."""
        arrays, (dy, dstate) = self.given(SMALL)
        ids, weights = ids_of([(), (1,), (2, 2)], SMALL.length), (0 * dy, dstate)
        _, state, gradients = self.run(form, arrays, ids, weights)
        np.testing.assert_array_equal(state[0], np.float32(arrays["initial_state"][0]))
        np.testing.assert_array_equal(gradients["initial_state"][0], np.float32(dstate[0]))
        assert (np.asarray(state[1:]) != arrays["initial_state"][1:]).all()
        other = arrays | {name: np.array(arrays[name]) for name in BY_POSITION}
        for name in BY_POSITION:
            assert not gradients[name][:, 4:].any(), name
            other[name][:, 4:] += 3.0
        np.testing.assert_array_equal(self.run(form, other, ids, weights)[1], state)

    def test_vmap_equals_one_after_the_other(self, form):
        arrays, weights = in_dtype(self.given(SMALL), "float32")
        ids = jnp.stack([ids_of([(k, 7 - k), (1, 3, k), (7,)], SMALL.length) for k in (1, 2)])
        run = self.program(form)
        stacked = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), arrays)
        mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(0, 0, None, None)))(stacked, ids, *weights)
        for index in range(2):
            one = jax.tree.map(lambda a, index=index: a[index], stacked)
            expected = jax.tree.leaves(run(one, ids[index], *weights))
            for actual, wanted in zip(jax.tree.leaves(mapped), expected, strict=True):
                np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)

    def over_devices(self, form, **options):
        """Losses of rows over all devices, and those of the rows: of what rows share and what they own."""
        devices = jax.devices()
        arrays = in_dtype(self.given(SMALL)[0], "float32")
        rows = {name: jnp.concatenate([a] * len(devices)) for name, a in arrays.items() if name not in PARAMETERS}
        ids = jnp.concatenate([ids_of([(2, 5), (1, 3), (7,)], SMALL.length)] * len(devices))
        shared = {name: arrays[name] for name in PARAMETERS}

        def losses(shared, rows, ids):
            y, state = self.op(**shared, **rows, segment_ids=ids, return_final_state=True, **self.forms[form] | options)
            return (y**2).reshape(len(y), -1).sum(1) + (state**3).reshape(len(y), -1).sum(1)

        split, whole = PartitionSpec("rows"), PartitionSpec()
        # JAX's interpreter of kernels does not mark what differs between devices.
        checked = form not in self.kernels or options.get("interpret") is False
        specs = {"in_specs": (whole, split, split), "out_specs": split, "check_vma": checked}
        sharded = jax.shard_map(losses, mesh=Mesh(np.array(devices), ("rows",)), **specs)
        gradients = (jax.value_and_grad(lambda *a, f=f: f(*a, ids).sum(), argnums=(0, 1)) for f in (sharded, losses))
        return *gradients, (shared, rows)

    def test_rows_over_the_devices_of_a_mesh(self, form):
        sharded, alone, arguments = self.over_devices(form)
        both = jax.jit(sharded)(*arguments), jax.jit(alone)(*arguments)
        for actual, wanted in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-3)

    def test_compiled_kernels_inside_a_checked_shard_map(self, kernel):
        sharded, _, arguments = self.over_devices(kernel, interpret=False)
        program = str(jax.make_jaxpr(sharded)(*arguments))
        assert all(name in program for name in self.kernel_names[:2])

    def test_left_out_inputs_are_zeros(self, form):
        arrays, weights = self.given(SMALL)
        zeros = {name: np.zeros_like(arrays[name]) for name in ("D", "dt_bias", "initial_state")}
        without = {name: a for name, a in arrays.items() if name not in zeros}
        shorter, full = self.run(form, without, None, weights), self.run(form, without | zeros, None, weights)
        for actual, expected in zip(shorter[:2], full[:2], strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
        for name, gradient in shorter[2].items():
            np.testing.assert_allclose(gradient, full[2][name], rtol=1e-5, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("initial", [True, False])
    def test_gradient_without_the_final_state(self, form, initial):
        """Nothing is written for it, nor for a first state that is zero; y and its gradients are the same."""
        arrays, (dy, dstate) = in_dtype(self.given(Case(50, initial=initial, sizes=self.small_sizes)), "float32")

        @jax.jit
        def run(arrays):
            y, pull = jax.vjp(lambda arrays: self.op(**arrays, **self.forms[form]), arrays)
            return y, pull(dy)[0]

        y, gradients = run(arrays)
        expected = self.program(form)(arrays, None, dy, 0 * dstate)
        assert_near(y, expected[0], 1e-6, "y")
        for name, gradient in gradients.items():
            assert_near(gradient, expected[2][name], 1e-5, name)

    def test_one_history_is_what_no_ids_say(self, form):
        arrays, weights = self.given(SMALL)
        both = (self.run(form, arrays, ids, weights) for ids in (np.full((BATCH, 7), 4, np.int32), None))
        for actual, expected in zip(*map(jax.tree.leaves, both), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)

    def test_the_same_bits_every_run(self, form):
        case = Case(50, ((13, 1, 26), (50,), (17,)), initial=True, sizes=self.small_sizes)
        arrays, weights = self.given(case)
        for first, second in zip(
            *(jax.tree.leaves(self.run(form, arrays, case.ids, weights)) for _ in range(2)), strict=True
        ):
            np.testing.assert_array_equal(first, second)

    @pytest.mark.parametrize("changed", ["x", "dt", "B", "C", "dy", None])
    def test_no_history_feels_another(self, any_form, changed):
        """Not by one bit, also where a neighbour's values are huge."""
        rows = ((5, 4, 11, 16, 14), (50,), (48, 2))
        case = Case(50, rows, initial=True, sizes=self.small_sizes)
        arrays, (dy, dstate) = in_dtype(self.given(case), "float32")
        row, inside = 0, slice(9, 20)

        def results(arrays, dy):
            y, state, gradients = self.program(any_form)(arrays, case.ids, dy, dstate)
            by_position = {"y": y} | {name: gradients[name] for name in BY_POSITION}
            return {name: np.array(a) for name, a in by_position.items()}, (state, gradients["initial_state"])

        def other(name, a):
            return a.at[row, inside].multiply(-1e30 if name == changed else -1.0)

        expected = results(arrays, dy)
        turned = {name: other(name, a) if name in BY_POSITION else a for name, a in arrays.items()}
        actual = results(turned, other("dy", dy))
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(expected))
        for name, a in actual[0].items():
            b = expected[0][name]
            assert not np.array_equal(a[row, inside], b[row, inside]), f"{name} does not depend on its own history"
            a[row, inside] = b[row, inside] = 0
            np.testing.assert_array_equal(a, b, err_msg=name)
        for a, b in zip(actual[1], expected[1], strict=True):
            np.testing.assert_array_equal(a, b)

    def test_bad_shapes(self, bad_shape):
        changed, message = bad_shape
        with pytest.raises(ValueError, match=message):
            self.op(**{name: jnp.ones(shape) for name, shape in (self.shapes | changed).items()})

    def test_bad_segment_ids(self):
        arrays = {name: jnp.ones(shape) for name, shape in self.shapes.items()}
        for ids, message in BAD_IDS:
            with pytest.raises(ValueError, match=message):
                self.op(**arrays, segment_ids=ids)

    def test_options_out_of_range(self):
        arrays = {name: jnp.ones(shape) for name, shape in self.shapes.items()}
        with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
            self.op(**arrays, chunk_size=0)
        with pytest.raises(ValueError, match=r"implementation='cuda' of \w+ must be one of \['\w+', '"):
            self.op(**arrays, implementation="cuda")
        with pytest.raises(ValueError, match=r"implementation='reference' of \w+ takes no interpret: leave"):
            self.op(**arrays, implementation="reference", interpret=True)


def _ids(*row):
    return np.array([row, [1] * 6, [0] * 6], np.int32)


# Of rows [3, 6].
BAD_IDS = [
    (jnp.ones((3, 5), jnp.int32), r"segment_ids is int32 of shape \(3, 5\), expected int32 \[b, l\] = \(3, 6\)"),
    (jnp.ones((3, 6)), r"segment_ids is float32 of shape \(3, 6\), expected int32 \[b, l\]"),
    (_ids(1, 2, 2, 1, 3, 3), r"segment_ids\[0\] has 1 behind 2 at position 3: ids must not fall"),
    (_ids(1, 0, 1, 0, 0, 0), r"segment_ids\[0\] has 1 behind 0 at position 2: .* 0 \(padding\) only ends a row"),
    (_ids(-2, -1, 1, 1, 0, 0), r"segment_ids has -2: ids must be positive, and 0 for padding"),
]
