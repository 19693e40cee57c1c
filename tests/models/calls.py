"""All models at small sizes, rows for them, and the one call of every model as tests of all models make it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.models.settings import settings_of
from tim4rec_jax.models import MASK, build_model, init_params, last_hidden, model_class, one_segment, variables

L, V, D = 12, 100, 16
SHAPE = {
    "vocab_size": V,
    "max_len": L,
    "d_model": D,
    "d_state": 8,
    "head_dim": 8,
    "chunk_size": 5,
    "attention_heads": 4,
    "inner_size": 24,
    "num_layers": 2,
    "dropout": 0.3,
    "time_dropout": 0.3,
    "attention_dropout": 0.3,
    "norm_eps": 1e-5,
    "time_span": 30,
    "date_knots": 5,
}
LENGTHS = np.array([12, 1, 3, 8])


def small(name, **changes):
    """Settings of a model; changes that it does not read are left out."""
    return settings_of(name, **SHAPE | changes)


def rows(columns=L, lengths=LENGTHS):
    """Items, none of them twice, and int32 seconds: of ties, short gaps and long ones."""
    rng = np.random.default_rng(0)
    inside = np.arange(columns) < np.asarray(lengths)[:, None]
    items = (1 + rng.permutation(V - 1)[: inside.size].reshape(inside.shape)) * inside
    gaps = rng.choice([0, 1, 5, 20, 400, 90_000, 3_000_000], inside.shape)
    return items.astype(np.int32), ((5_000 + np.cumsum(gaps, axis=1)) * inside).astype(np.int32)


def asked(name, items, lengths):
    """Rows and lengths at whose last position a model scores the next item: these, or with a mask behind the events."""
    if not model_class(name).cloze:
        return items, lengths
    events = [[*row[:n][-(L - 1) :], MASK] for row, n in zip(items.tolist(), lengths, strict=True)]
    filled = [row + [0] * (L - len(row)) for row in events]
    return np.array(filled, np.int32), np.array([len(row) for row in events])


def call(model, params, items, lengths, timestamps, where="all", **options):
    """Hidden states at "all" positions [b, l, d], or at the "last" real one [b, d]."""
    if where == "last":
        return last_hidden(model, variables(params), items, lengths, timestamps, **options)
    if not model.packable:
        options["segment_ids"] = one_segment(lengths, items.shape[1])
    return model.apply(variables(params), items, timestamps, **options)[0]


@functools.cache
def program(config, where, deterministic=True):
    """`call` jitted: (params, items, lengths, timestamps, example ids, seed of dropout)."""
    model = build_model(config)

    @jax.jit
    def run(params, items, lengths, timestamps, example_ids=None, seed=0):
        options = {"deterministic": deterministic, "example_ids": example_ids}
        options["rngs"] = {"dropout": jax.random.key(seed)}
        return call(model, params, items, lengths, timestamps, where, **options)

    return run


def shapes_of(config):
    return jax.eval_shape(functools.partial(init_params, build_model(config)), jax.random.key(0))


@functools.cache
def initial(config):
    return jax.jit(functools.partial(init_params, build_model(config)))(jax.random.key(0))


@functools.cache
def spread(config):
    """Parameters so far from their initial values that every part of the model has its say."""
    leaves, tree = jax.tree.flatten(shapes_of(config))
    rng = np.random.default_rng(0)
    draws = [rng.normal(size=leaf.shape) * (0.4 if leaf.ndim > 1 else 1.0) for leaf in leaves]
    return jax.tree.unflatten(tree, [jnp.asarray(draw.astype(np.float32), config.dtype) for draw in draws])


def primitives(jaxpr):
    """(name, first output) of every operation, inner functions included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.outvars[0].aval
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)
