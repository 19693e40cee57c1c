"""What a training run keeps from its first step to its last: data, model, optimiser, devices, compiled steps."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from tim4rec_jax.config import BINARY_LOSSES, ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog, with_precision
from tim4rec_jax.data.loader import Loader, make_loader, timestamps_for_device
from tim4rec_jax.data.packing import LengthGroup, plan_length_groups, plan_packed_rows, window_histories
from tim4rec_jax.data.splits import Split, split_log, training_times
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator, require_lengths
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, first_rows, measured
from tim4rec_jax.evaluation.slices import slices
from tim4rec_jax.models import STATISTICS, SequentialModel, build_model
from tim4rec_jax.parallel.mesh import Layout, make_layout
from tim4rec_jax.training.step import (
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    train_step,
    train_steps,
)

# Rows of a sharded item table are filled up to a multiple of this, so that a run may go on with 2, 4, 8 .. shards.
EQUAL_SHARDS = 64
# What XLA records into CUDA graphs; kernels of Triton are custom calls.
_CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE"
# On a CPU LLVM's first level compiles a step in three quarters of the default's time, and the step runs no slower.
_CPU_OPTIONS = {"xla_backend_optimization_level": 1}


def step_options() -> dict[str, Any]:
    """Returns the compiler's options for a training step on this platform."""
    return _CPU_OPTIONS if jax.default_backend() == "cpu" else {}


def with_data(config: ExperimentConfig, log: InteractionLog) -> ExperimentConfig:
    """Fills in what the data decide: the order of events, the catalogue's size, and rows that make shards equal."""
    shards, multiple = config.parallel.catalogue_shards, config.model.vocab_multiple
    multiple = math.lcm(EQUAL_SHARDS, shards) if shards > 1 and multiple == 1 else multiple
    sizes = {"vocab_size": log.num_items + 1, "vocab_multiple": multiple}
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, **sizes), data=with_precision(config.data, log)
    )


def split_that_fits(config: ExperimentConfig, log: InteractionLog) -> Split:
    """Splits a log after making sure that an experiment can be trained and measured on it; touches no device.

    Args:
      config: settings, with what the data decide filled in.
      log: cleaned log.

    Raises:
      ValueError: nothing to train on or to test, lists longer than the catalogue, times beyond the precision, windows
        that are all context, or a table of users that cannot be read.
    """
    split = split_log(log, config.data)
    if len(split.train) == 0:
        least = 3 if config.data.split == "leave_one_out" else 1
        raise ValueError(
            f"the log has 0 training examples: every user has {least} events or fewer; give longer histories"
        )
    if config.data.holds_out and len(split.test) == 0:
        raise ValueError("the log has 0 test targets; give more users, or longer histories")
    timestamps_for_device(
        log.timestamps[[log.timestamps.argmin(), log.timestamps.argmax()]], config.data.timestamp_precision
    )
    if config.train.positions != "last":
        window_histories(np.array([1]), config.model.max_len, config.train.window_context)
    if config.data.holds_out:
        require_lengths(config.eval, log.num_items)
        first = first_rows(log)
        measured(log, split.valid, config.eval, first)
        slices(log, measured(log, split.test, config.eval, first)[ALL_ITEMS].examples, config.eval)
    return split


class Setup:
    """What a run keeps from its first step to its last: data, model, optimiser, devices.

    Args:
      config: settings, with what the data decide filled in.
      log: cleaned log.
    """

    def __init__(self, config: ExperimentConfig, log: InteractionLog) -> None:
        self.config, self.log = config, log
        self.split: Split = split_that_fits(config, log)
        self.model: SequentialModel = build_model(config.model)
        # Beside the parameters: with them they are saved and evaluated, and no step changes them.
        self.statistics = {}
        if self.model.data_statistics():
            self.statistics = {STATISTICS: self.model.data_statistics(**training_times(log, self.split))}
        self.layout: Layout = make_layout(config.parallel)
        indices = self.layout.batch_indices(config.train.batch_size)
        self.loader: Loader = make_loader(config, log, self.split.train, indices)
        self.device_data = self.layout.replicate(self.loader.resident)
        self.total_steps = config.train.epochs * self.loader.num_batches
        if config.train.max_steps is not None:
            self.total_steps = min(self.total_steps, config.train.max_steps)
        self.schedule = learning_rate_schedule(config.train, self.total_steps)
        self.optimizer = make_optimizer(config.train, self.total_steps)
        self.groups = self._plan_groups()
        self.validate = None
        if config.data.holds_out:
            self.validate = FullSortEvaluator(
                self.model, log, self.split.valid, config, mesh=self.layout.mesh, in_parts=False
            )

    def _plan_groups(self) -> tuple[LengthGroup, ...]:
        train, max_len = self.config.train, self.config.model.max_len
        options = {
            "batch_size": self.layout.rows_per_device(train.batch_size),
            "microbatch_tokens": train.microbatch_tokens,
            "platform": jax.default_backend(),
        }
        if train.positions != "last":
            return plan_packed_rows(max_len, **options)
        lengths = np.minimum(self.split.train.ends, max_len)
        vocab_size = self.config.model.vocab_size
        if train.loss in BINARY_LOSSES and train.num_negatives is not None:  # Each target has its own.
            scores = min(vocab_size, (train.num_negatives + 1) * self.config.model.d_model)
        elif train.num_negatives is not None:
            scores = train.num_negatives + 1
        else:
            # With a sharded item table the scores of whole rows never exist, so they limit nothing.
            scores = 1 if self.layout.catalogue_shards > 1 else vocab_size
        return plan_length_groups(lengths, max_len, max_groups=train.length_groups, vocab_size=scores, **options)

    def init_state(self) -> TrainState:
        """Returns the state before the first step, where training wants it."""
        return self.layout.init_sharded(lambda: init_state(self.model, self.optimizer, self.config.train.seed))

    def compile_steps(self, state: TrainState, batches: tuple[Any, ...]) -> Any:
        """Compiles a step per batch; the state is donated, so an update needs no second copy of it."""
        fixed = self.model, self.optimizer, self.config, self.groups, self.loader
        step = functools.partial(train_step, *fixed, statistics=self.statistics)
        steps = functools.partial(train_steps, step)
        lowered = self.layout.compile_step(steps).lower(state, self.device_data, batches)
        if not self.config.train.capture:
            return lowered.compile(compiler_options=step_options())
        try:
            return lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": _CAPTURED})
        except jax.errors.JaxRuntimeError as error:
            if "xla_gpu_enable_command_buffer" not in str(error):
                raise
            raise ValueError("train.capture=True: this JAX has no command buffers of that kind; leave it out") from None
