"""Every form of the cross-entropy over a catalogue against all scores at once in float64."""

import functools
from dataclasses import dataclass

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.mosaic import INTERPRETS_PRODUCTS
from kernels.softmax_cross_entropy import (
    IMPLEMENTATIONS,
    LoopConfig,
    TritonConfig,
    XlaConfig,
    log_sum_exp,
    softmax_cross_entropy,
)
from kernels.softmax_cross_entropy.config import triton_config, xla_config
from tests.kernels.op_suite import assert_near
from tim4rec_jax.training.losses import cross_entropy


def cut(own, other, columns, programs=1):
    loop = LoopConfig(own, other, columns, num_warps=4, num_stages=1, programs=programs)
    return TritonConfig(loop, loop, loop)


# One program for each block, and every walk in parts; whole rows, and rows in strips.
FORMS = {
    "reference": [None],
    "xla": [None, XlaConfig(7)],
    "pallas_triton": [None, cut(16, 32, 64), cut(16, 16, 16, programs=9)],
    "pallas_mosaic": [None],
}
MARKS = {
    "pallas_mosaic": [
        pytest.mark.exhaustive,
        pytest.mark.skipif(not INTERPRETS_PRODUCTS, reason="JAX 0.10 does not interpret its products"),
    ]
}
by_form = pytest.mark.parametrize(
    ("implementation", "config"),
    [
        pytest.param(name, c, id=f"{name}-{i}", marks=MARKS.get(name, []))
        for name, configs in FORMS.items()
        for i, c in enumerate(configs)
    ],
)
# Without a GPU the kernels are interpreted.
by_implementation = pytest.mark.parametrize(
    "implementation", [pytest.param(name, marks=MARKS.get(name, [])) for name in FORMS]
)


def factors(implementation):
    """The precision to ask for: whole float32 factors, where they are offered; interpreted ones are whole anyway."""
    return "default" if implementation == "pallas_mosaic" else "highest"


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
      targets, items, width: t, v, d.
      masked: some items are.
      scale: standard deviation of the scores.
    """

    targets: int
    items: int
    width: int
    masked: bool = False
    scale: float = 2.0


CASES = [
    Case(1, 1, 1),
    Case(5, 3, 8),
    Case(33, 70, 20, masked=True),
    Case(16, 64, 64, masked=True, scale=30.0),
    Case(64, 341, 64),
    Case(20, 37, 72),
]
MIDDLE = CASES[2]


@functools.cache
def inputs(case):
    """Float64 arrays whose values are float32 numbers; a target in seven is absent, none is masked."""
    rng = np.random.default_rng([case.targets, case.items, case.width])
    shapes = (case.targets, case.width), (case.items, case.width), (case.targets,)
    hidden, embedding, d_loss = (rng.normal(size=s).astype(np.float32).astype(np.float64) for s in shapes)
    hidden *= np.float32(case.scale / np.sqrt(case.width))
    masked = rng.random(case.items) < 0.3 if case.masked else np.zeros(case.items, bool)
    targets = rng.choice(np.flatnonzero(~masked), case.targets).astype(np.int32)
    targets[6::7] = -1 - rng.integers(0, 1000, targets[6::7].shape)
    return hidden.astype(np.float32).astype(np.float64), embedding, targets, masked if case.masked else None, d_loss


def in_numpy(hidden, embedding, targets, masked, d_loss):
    """Loss and gradients from the dense softmax, in float64."""
    hidden, embedding, d_loss = (np.asarray(a, np.float64) for a in (hidden, embedding, d_loss))
    scores = hidden @ embedding.T
    if masked is not None:
        scores[:, masked] = -np.inf
    largest = scores.max(1, keepdims=True)
    lse = largest[:, 0] + np.log(np.exp(scores - largest).sum(1))
    rows, known = np.arange(targets.size), targets >= 0
    loss = np.where(known, lse - scores[rows, np.where(known, targets, 0)], 0)
    d_scores = np.exp(scores - lse[:, None])
    d_scores[rows[known], targets[known]] -= 1
    d_scores *= np.where(known, d_loss, 0)[:, None]
    return loss, d_scores @ embedding, d_scores.T @ hidden


@functools.cache
def program(implementation, config=None, precision=None):
    """Jitted (hidden, embedding, targets, masked, d_loss) -> loss and gradients by hidden and embedding."""

    @jax.jit
    def run(hidden, embedding, targets, masked, d_loss):
        def loss(hidden, embedding):
            options = {"implementation": implementation, "config": config}
            options["precision"] = precision or factors(implementation)
            return softmax_cross_entropy(hidden, embedding, targets, masked=masked, **options)

        loss, pull = jax.vjp(loss, hidden, embedding)
        return loss, *pull(d_loss.astype(loss.dtype))

    return run


def cast(case, dtype, d_loss_dtype=jnp.float32):
    hidden, embedding, targets, masked, d_loss = inputs(case)
    masked = None if masked is None else jnp.asarray(masked)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    return (
        jnp.asarray(hidden, dtypes[0]),
        jnp.asarray(embedding, dtypes[1]),
        jnp.asarray(targets),
        masked,
        jnp.asarray(d_loss, d_loss_dtype),
    )


def check(actual, expected, value_tolerance, gradient_tolerance):
    names = ("loss", value_tolerance), ("by hidden", gradient_tolerance), ("by embedding", gradient_tolerance)
    for (name, tolerance), a, e in zip(names, actual, expected, strict=True):
        # One item has loss 0, which has no scale of its own.
        assert_near(a, e, tolerance, name) if np.abs(e).max() > 1e-6 else np.testing.assert_allclose(a, e, atol=1e-6)


def test_the_suite_knows_every_implementation():
    assert {*FORMS} == set(IMPLEMENTATIONS)


@by_form
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float32(case, implementation, config):
    arguments = cast(case, "float32")
    actual = program(implementation, config)(*arguments)
    assert [a.dtype for a in actual] == [jnp.float32] * 3
    check(actual, in_numpy(*inputs(case)), 2e-5, 1e-4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case, implementation, x64):
    actual = program(implementation, XlaConfig(7) if implementation == "xla" else None)(*cast(case, "float64", float))
    assert [a.dtype for a in actual] == [jnp.float64] * 3
    check(actual, in_numpy(*inputs(case)), 1e-12, 1e-12)


@by_implementation
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_bfloat16_on_either_side(implementation, dtypes):
    arguments = cast(MIDDLE, dtypes)
    actual = program(implementation)(*arguments)
    assert [str(a.dtype) for a in actual] == ["float32", *dtypes]
    # Products are made in the dtype of hidden.
    rounded = (arguments[0], arguments[1].astype(dtypes[0]))
    check(actual, in_numpy(*rounded, *inputs(MIDDLE)[2:]), 1e-5 if dtypes[0] == dtypes[1] else 5e-3, 2e-2)


@by_implementation
def test_the_loss_of_training(implementation):
    """The same number as the library's loss from all scores, row 0 included."""
    hidden, embedding, targets, _, _ = cast(CASES[4], "float32")
    targets = jnp.abs(targets) % CASES[4].items
    loss, *_ = program(implementation)(hidden, embedding, targets, None, jnp.ones(targets.size))
    np.testing.assert_allclose(loss, cross_entropy(hidden @ embedding.T, targets), rtol=1e-5, atol=1e-5)


@functools.cache
def log_sum_exp_program(implementation, config=None):
    """Jitted (hidden, embedding, masked, d_lse) -> log-sum-exp and gradients by hidden and embedding."""

    @jax.jit
    def run(hidden, embedding, masked, d_lse):
        options = {"masked": masked, "implementation": implementation, "config": config}
        options["precision"] = factors(implementation)
        lse, pull = jax.vjp(lambda *arrays: log_sum_exp(*arrays, **options), hidden, embedding)
        return lse, *pull(d_lse.astype(lse.dtype))

    return run


@by_form
def test_log_sum_exp_alone(implementation, config):
    """The loss without the target's score, of which the dense softmax knows nothing with targets left out."""
    hidden, embedding, _, masked, d_lse = cast(MIDDLE, "float32")
    found = log_sum_exp_program(implementation, config)(hidden, embedding, masked, d_lse)
    scores = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    scores[:, np.asarray(masked)] = -np.inf
    lse = np.log(np.exp(scores).sum(1))
    d_scores = np.exp(scores - lse[:, None]) * np.asarray(d_lse, np.float64)[:, None]
    check(found, (lse, d_scores @ np.asarray(embedding), d_scores.T @ np.asarray(hidden)), 2e-5, 1e-4)


@by_implementation
def test_log_sum_exp_of_nothing(implementation):
    """A part of a catalogue may hold no item at all: -inf, and no gradient where the whole gives it no weight."""
    hidden, embedding, _, masked, d_lse = cast(MIDDLE, "float32")
    # Scores beyond 88, whose exponentials overflow.
    found = log_sum_exp_program(implementation)(500 * hidden, embedding, jnp.ones_like(masked), jnp.zeros_like(d_lse))
    assert (found[0] == -jnp.inf).all()
    for gradient in found[1:]:
        np.testing.assert_array_equal(gradient, 0)


@by_implementation
def test_targets_that_are_no_items(implementation):
    """Absent: no loss and no gradient. Masked: infinite. Too large: not a number."""
    hidden, embedding, targets, masked, d_loss = cast(MIDDLE, "float32")
    masked_item = int(np.flatnonzero(masked)[0])
    targets = targets.at[:4].set(jnp.array([-1, masked_item, MIDDLE.items, -(2**31)]))
    loss, d_hidden, d_embedding = program(implementation)(hidden, embedding, targets, masked, d_loss)
    assert loss[0] == 0 and loss[1] == np.inf and np.isnan(loss[2]) and loss[3] == 0
    assert np.isfinite(loss[4:]).all() and np.isfinite(d_hidden).all() and np.isfinite(d_embedding).all()
    assert (d_hidden[0] == 0).all() and (d_hidden[3] == 0).all() and (d_hidden[1] != 0).any()
    assert (d_embedding[np.asarray(masked)] == 0).all()
    only_absent = jnp.where(jnp.arange(targets.size) < 1, targets, -1)
    for gradient in program(implementation)(hidden, embedding, only_absent, masked, d_loss)[1:]:
        assert (gradient == 0).all()


@by_implementation
def test_masked_items_have_no_say(implementation):
    hidden, embedding, targets, masked, d_loss = cast(MIDDLE, "float32")
    run = program(implementation)
    expected = run(hidden, embedding, targets, masked, d_loss)
    other = jnp.where(masked[:, None], 7.0, embedding)
    for actual, wanted in zip(run(hidden, other, targets, masked, d_loss), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@by_implementation
def test_scores_far_from_zero(implementation):
    """exp overflows beyond 88 in float32; the loss is right at thousands of either sign."""
    embedding = jnp.linspace(-1.0, 1.0, 50)[:, None] * jnp.ones(16)
    hidden = jnp.array([500.0, -500.0, 300.0])[:, None] * jnp.ones(16)
    targets = jnp.array([49, 0, 47])
    arguments = hidden, embedding, targets, None, jnp.ones(3)
    expected = in_numpy(hidden, embedding, np.asarray(targets), None, np.ones(3))
    check(program(implementation)(*arguments), expected, 1e-5, 1e-4)


@by_implementation
def test_same_bits_every_run(implementation):
    arguments = cast(MIDDLE, "float32")
    first, second = (program(implementation)(*arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@by_implementation
def test_vmap_equals_one_after_the_other(implementation):
    hidden, embedding, targets, masked, d_loss = cast(MIDDLE, "float32")
    run = program(implementation)
    pair = jnp.stack([hidden, 0.5 * hidden]), jnp.stack([embedding, embedding[::-1]]), jnp.stack([targets, targets])
    mapped = jax.jit(jax.vmap(run.__wrapped__, in_axes=(0, 0, 0, None, None)))(*pair, masked, d_loss)
    for index in range(2):
        expected = run(*(a[index] for a in pair), masked, d_loss)
        for actual, wanted in zip(mapped, expected, strict=True):
            np.testing.assert_allclose(actual[index], wanted, rtol=1e-4, atol=1e-5)


@by_implementation
def test_inside_shard_map(implementation):
    """Targets over the devices, the embedding on all of them: its gradient is summed, the rest is as on one."""
    if implementation == "pallas_mosaic":
        pytest.skip("JAX's interpreter of Mosaic GPU kernels ends with an error about barriers on several devices")
    devices = jax.devices()
    hidden, embedding, targets, masked, d_loss = cast(Case(8 * len(devices), 40, 16, masked=True), "float32")
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def loss(hidden, embedding, targets, masked):
        options = {"precision": factors(implementation), "implementation": implementation}
        return softmax_cross_entropy(hidden, embedding, targets, masked=masked, **options)

    # The interpreter of kernels makes arrays that do not say over which axes they differ.
    checked = implementation not in ("pallas_triton", "pallas_mosaic")
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(rows, whole, rows, whole), out_specs=rows, check_vma=checked)

    @jax.jit
    def run(hidden, embedding):
        losses, pull = jax.vjp(lambda *arrays: sharded(*arrays, targets, masked), hidden, embedding)
        return losses, *pull(d_loss)

    expected = program(implementation)(hidden, embedding, targets, masked, d_loss)
    for actual, wanted in zip(run(hidden, embedding), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("targets", "items"), [(4096, 1_000_000), (102_400, 12_102)])
def test_memory_of_the_plain_form(targets, items):
    """Loss and gradient take little beyond arguments and gradients, in any platform's cut; [t, v] would be 16 GB."""
    width = 64
    shapes = [((targets, width), "float32"), ((items, width), "float32"), ((targets,), "int32")]
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def loss(hidden, embedding, targets):
        return softmax_cross_entropy(hidden, embedding, targets, implementation="xla", config=config).mean()

    gradients = 4 * width * (targets + items)
    for config in (xla_config(targets), XlaConfig(max(128, 2**24 // targets))):
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        assert memory.output_size_in_bytes < gradients + 1000
        assert memory.temp_size_in_bytes < 400e6, config


def inner_arrays(jaxpr):
    """Shapes of all arrays between the operations of a program, those inside kernels left out."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        if equation.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from inner_arrays(inner)


@pytest.mark.parametrize("width", [64, 256])
def test_memory_between_kernels(width):
    """All arrays that the kernel form ever makes, counted as if none were freed."""
    targets, items = 4096, 1_000_000

    def gradients(hidden, embedding, targets):
        def loss(hidden, embedding):
            return softmax_cross_entropy(
                hidden, embedding, targets, implementation="pallas_triton", interpret=False
            ).mean()

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, embedding)

    shapes = [((targets, width), "float32"), ((items, width), "float32"), ((targets,), "int32")]
    jaxpr = jax.make_jaxpr(gradients)(*(jax.ShapeDtypeStruct(*s) for s in shapes)).jaxpr
    sizes = [a.size * a.dtype.itemsize for a in inner_arrays(jaxpr)]
    own = 4 * width * items
    # The gradient by the embedding appears as the kernel's output and as the same without its axis of one part.
    assert max(sizes) == own
    assert sum(size for size in sizes if size < own) < 200e6
    assert sum(sizes) <= 5 * own


def test_a_loop_is_shared_where_blocks_are_few():
    loop = LoopConfig(64, 32, 64, num_warps=4, num_stages=2, programs=264)
    assert loop.split(2048, 12102) == (8, 48)
    assert loop.split(1_000_000, 4096) == (1, 128)
    assert loop.split(1, 40) == (2, 1)
    for own, other in [(2048, 3417), (100, 33), (64, 32)]:
        parts, steps = loop.split(own, other)
        assert (parts - 1) * steps * loop.other < other <= parts * steps * loop.other


def test_choices_for_any_shape():
    for width in (1, 16, 33, 64, 100, 128, 200, 256):
        for precision in ("tfloat32", "float32"):
            for itemsize in (2, 4):
                assert triton_config(width, itemsize, precision).forward.own >= 16
    assert xla_config(2048) == XlaConfig(256)
    assert xla_config(10**6) == XlaConfig(128)
    assert xla_config(1) == XlaConfig(8192)


GIVEN = {"hidden": jnp.ones((4, 8)), "embedding": jnp.ones((9, 8)), "targets": jnp.ones(4, jnp.int32)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": jnp.ones((4, 8, 1))}, r"hidden has shape \(4, 8, 1\), expected \[t, d\]"),
        ({"hidden": jnp.ones((0, 8))}, r"hidden has shape \(0, 8\), expected \[t, d\] with t and d at least 1"),
        ({"embedding": jnp.ones((9, 7))}, r"embedding has shape \(9, 7\), expected \[v, 8\]"),
        ({"embedding": jnp.ones((9, 8), jnp.int32)}, r"embedding has dtype int32, expected a floating one"),
        ({"targets": jnp.ones(5, jnp.int32)}, r"targets is int32 of shape \(5,\), expected integers \(4,\)"),
        ({"targets": jnp.ones(4)}, r"targets is float32 of shape \(4,\), expected integers \(4,\)"),
        ({"masked": jnp.ones(9)}, r"masked is float32 of shape \(9,\), expected bool \(9,\)"),
        ({"masked": jnp.ones(4, bool)}, r"masked is bool of shape \(4,\), expected bool \(9,\)"),
        (
            {"implementation": "cuda"},
            r"implementation='cuda' of softmax_cross_entropy must be one of \['pallas_mosaic', 'pal",
        ),
        ({"implementation": "pallas_triton", "precision": "int8"}, r"precision='int8' must be one of 'default', "),
        ({"config": cut(16, 16, 16)}, r"config=TritonConfig.* is not for implementation='xla'"),
        (
            {"implementation": "reference", "config": XlaConfig(1)},
            r"'reference' of softmax_cross_entropy takes no config",
        ),
    ],
)
def test_arguments_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        softmax_cross_entropy(**(GIVEN | changed))


def test_what_the_kernels_do_not_offer():
    wide = {"hidden": jnp.ones((4, 300)), "embedding": jnp.ones((9, 300)), "targets": GIVEN["targets"]}
    with pytest.raises(ValueError, match="d=300 is more than the 256 that the GPU kernels take"):
        softmax_cross_entropy(**wide, implementation="pallas_triton")
    with pytest.raises(ValueError, match="d=300 is more than the 256 that the GPU kernels take"):
        softmax_cross_entropy(**wide, implementation="pallas_mosaic")
    mosaic = {"implementation": "pallas_mosaic", "interpret": False}
    for options, message in [
        ({"precision": "highest"}, r"precision='highest': the kernels on Mosaic GPU offer TF32 \('default'\) alone"),
        ({"config": cut(16, 16, 16)}, "'pallas_mosaic' of softmax_cross_entropy takes no config"),
    ]:
        with pytest.raises(ValueError, match=message):
            softmax_cross_entropy(**GIVEN, **mosaic, **options)
    if not INTERPRETS_PRODUCTS:
        with pytest.raises(
            ValueError, match="implementation='pallas_mosaic' without a GPU needs JAX 0.11, this is 0.10"
        ):
            softmax_cross_entropy(**GIVEN, implementation="pallas_mosaic", interpret=True)
    half = GIVEN | {"embedding": jnp.ones((9, 8), jnp.float16)}
    with pytest.raises(ValueError, match="embedding has dtype float16, the GPU kernels take"):
        softmax_cross_entropy(**half, implementation="pallas_triton")
    with pytest.raises(ValueError, match="other=24 must be a power of two, 16 at least"):
        cut(16, 24, 16)
    with pytest.raises(ValueError, match="tile_size=0 must be at least 1"):
        XlaConfig(0)
