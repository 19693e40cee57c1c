"""The one call of every model, at all positions or at the last, as tests of all models make it."""

import functools

import jax

from tim4rec_jax.models import build_model, last_hidden, one_segment, variables


def call(model, params, items, lengths, timestamps, where="all", **options):
    """Hidden states at "all" positions [b, l, d], or at the "last" real one [b, d]."""
    if where == "last":
        return last_hidden(model, variables(params), items, lengths, timestamps, **options)
    if not model.packable:
        options["segment_ids"] = one_segment(lengths, items.shape[1])
    found = model.apply(variables(params), items, timestamps, **options)
    # With recorded intermediates there is a second result.
    return (found[0][0], found[1]) if "capture_intermediates" in options else found[0]


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
