"""A trained model as programs that run without this library: StableHLO by `jax.export`, arrays, and a description."""

import dataclasses
import functools
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jax import export

from tim4rec_jax.evaluation.metrics import check_top_k
from tim4rec_jax.files import locked, replacing_folder
from tim4rec_jax.models import apply_method, build_model, item_scores, last_hidden, variables
from tim4rec_jax.serving.item_index import RECALL_AT, require_usearch, write_index
from tim4rec_jax.serving.ranking import best_columns, score_rows
from tim4rec_jax.serving.recommender import Recommender

EXPORT_FORMAT = 2
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PARAMETERS, ITEMS, ALLOWED, DESCRIPTION = "parameters.npz", "items.parquet", "allowed.npy", "export.json"
INDEX = "items.usearch"
# Users whose stored histories measure an index.
MEASURED_USERS = 1000

_MEANINGS = {
    "parameters": f"the arrays of {PARAMETERS} by name",
    "items": "items of the history, oldest first, as indices from 1 (column index of items.parquet), padded with 0",
    "lengths": "events of the history, 1 to max_len",
    "timestamps": "seconds since 1970 of the events, padded with 0",
    "seen": "item indices of the whole history, by which scores differ; filled with 0",
    "excluded": "item indices to leave out of the list; 0 for none",
    "allowed": f"whether the item of each index may be recommended; {ALLOWED} holds what was asked for at the export",
    "state": "all zeros before the first event; give back what the last call returned",
    "item": "index of the new event's item",
    "timestamp": "seconds since 1970 of the new event, never before the history's last",
    "hidden": "what top_k ranks from, and an index of the items is asked with",
    "best": "indices of the best items, best first; 0 where fewer than k are left",
    "scores": "their scores, logits; minus infinity where fewer than k are left",
}


class _Program(NamedTuple):
    """One function to export, its arguments by name as shapes, and what it returns."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    results: tuple[str, ...]


def flat_arrays(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, such as "layers_0/mixer/D"."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _portable(model: nn.Module) -> nn.Module:
    """The same model in operators that every platform runs."""
    return build_model(dataclasses.replace(model.config, kernels="xla"))


def _row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Maps a function of batches over rows: what it decides from the batch's size is then decided for one row."""

    def one(*arguments: Any) -> Any:
        results = function(*(jax.tree.map(lambda a: a[None], argument) for argument in arguments))
        return jax.tree.map(lambda a: a[0], results)

    return jax.vmap(one)


def _programs(recommender: Recommender, k: int, *, ann: bool) -> dict[str, _Program]:
    model, params, max_len = _portable(recommender.model), recommender.params, recommender.max_len
    config = model.config
    time_dtype = jnp.float32 if recommender.config.data.timestamp_precision == "float32" else jnp.int32
    structure = jax.tree.structure(params)
    names = list(flat_arrays(params))
    b, s, h = export.symbolic_shape("b, s, h")

    def collections(parameters: dict[str, jax.Array]) -> dict[str, Any]:
        return variables(jax.tree.unflatten(structure, [parameters[name] for name in names]))

    def shape(*sizes: Any, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def rank(parameters: Any, hidden: jax.Array, *rules: Any) -> tuple[jax.Array, jax.Array]:
        *seen, excluded, allowed = rules
        scores = item_scores(model, collections(parameters), hidden, *seen)
        best, indices, _ = best_columns(scores, excluded, k, allowed)
        return jnp.where(best > -jnp.inf, indices, 0).astype(jnp.int32), best

    def encode(parameters: Any, items: Any, lengths: Any, *timestamps: Any) -> jax.Array:
        def of_rows(items: Any, lengths: Any, timestamps: Any = None) -> jax.Array:
            return last_hidden(model, collections(parameters), items, lengths, timestamps)

        return _row_by_row(of_rows)(items, lengths, *timestamps)

    def recommend(parameters: Any, items: Any, lengths: Any, *rest: Any) -> tuple[jax.Array, jax.Array]:
        times = rest[: len(rest) - len(restricted)]
        return rank(parameters, encode(parameters, items, lengths, *times), *rest[len(times) :])

    parameters = {name: shape(*leaf.shape, dtype=leaf.dtype) for name, leaf in flat_arrays(params).items()}
    # Models of fixed length ask for all their timestamps, also where fewer events are read.
    columns = max(max_len, config.max_len)
    time = {"timestamps": shape(b, columns, dtype=time_dtype)} if model.uses_time else {}
    restricted = {"seen": shape(b, h)} if config.seen_bias else {}
    restricted |= {"excluded": shape(b, s), "allowed": shape(config.vocab_size, dtype=jnp.bool_)}
    history = {"items": shape(b, max_len), "lengths": shape(b), **time, **restricted}
    programs = {"recommend": _Program(recommend, {"parameters": parameters, **history}, ("best", "scores"))}
    if ann:
        read = {name: history[name] for name in ("items", "lengths", *time)}
        programs["encode"] = _Program(encode, {"parameters": parameters, **read}, ("hidden",))
    if not model.streamable:
        return programs

    empty = jax.eval_shape(lambda p: model.apply(variables(p), 1, method="init_cache"), params)
    state_structure, state_names = jax.tree.structure(empty), list(flat_arrays(empty))

    def step(parameters: Any, state: Any, item: Any, *timestamp: Any) -> tuple[Any, jax.Array]:
        def extend(state: Any, item: Any, *timestamp: Any) -> tuple[Any, jax.Array]:
            before = jax.tree.unflatten(state_structure, [state[name] for name in state_names])
            seconds = timestamp[0][:, None] if timestamp else None
            segments = jnp.ones((1, 1), jnp.int32)
            hidden, after = model.apply(
                collections(parameters), item[:, None], seconds, segment_ids=segments, cache=before
            )
            return flat_arrays(after), hidden[:, 0]

        return _row_by_row(extend)(state, item, *timestamp)

    state = {name: shape(b, *leaf.shape[1:], dtype=leaf.dtype) for name, leaf in flat_arrays(empty).items()}
    time = {"timestamp": shape(b)} if model.uses_time else {}
    event = {"parameters": parameters, "state": state, "item": shape(b), **time}
    hidden = {"hidden": shape(b, config.d_model, dtype=config.dtype), **restricted}
    programs["step"] = _Program(step, event, ("state", "hidden"))
    programs["top_k"] = _Program(rank, {"parameters": parameters, **hidden}, ("best", "scores"))
    return programs


def _described(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _described(leaf) for name, leaf in sorted(value.items())}
    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return {"shape": sizes, "dtype": jnp.dtype(value.dtype).name}


def _argument(name: str, value: Any) -> dict[str, Any]:
    """Parameters and states are described once, by their files and programs; everything else here."""
    if name == "parameters":
        return {"name": name, "meaning": _MEANINGS[name]}
    described = {"arrays": _described(value)} if isinstance(value, dict) else _described(value)
    return {"name": name, **described, "meaning": _MEANINGS[name]}


def _export(name: str, program: _Program, platforms: Sequence[str], folder: pathlib.Path) -> dict[str, Any]:
    """Writes one program and returns its description."""
    exported = export.export(jax.jit(program.function), platforms=platforms)(*program.arguments.values())
    file = f"{name}.jax_export"
    (folder / file).write_bytes(bytes(exported.serialize()))
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    results = results if isinstance(results, tuple) else (results,)
    arguments = ", ".join(program.arguments)
    return {
        "file": file,
        "call": f"{', '.join(program.results)} = call({arguments})",
        "inputs": [_argument(key, value) for key, value in program.arguments.items()],
        "outputs": [_argument(key, value) for key, value in zip(program.results, results, strict=True)],
        "calling_convention_version": exported.calling_convention_version,
    }


def _item_table(recommender: Recommender) -> np.ndarray:
    """The rows of padding and of every item, float32 [items + 1, d]."""
    table = apply_method(recommender.model, variables(recommender.params), "item_table")
    return np.asarray(table.astype(jnp.float32))[: recommender.num_items + 1]


def _write_index(recommender: Recommender, folder: pathlib.Path) -> dict[str, Any]:
    """Writes the index of all items and returns its description; users' stored histories measure it."""
    users = recommender.users
    measured = [users[i] for i in np.linspace(0, len(users) - 1, min(len(users), MEASURED_USERS)).astype(int)]
    histories = [recommender.history_of_user(user) for user in measured]

    model, read, rows = recommender.model, variables(recommender.params), score_rows(recommender.num_items + 1)

    @functools.partial(jax.jit, static_argnums=2)
    def best_of(read: Any, hidden: jax.Array, k: int) -> jax.Array:
        # Nothing is seen: what the history adds to a score is no inner product.
        scores = item_scores(model, read, hidden, jnp.zeros((len(hidden), 1), jnp.int32))
        return jax.lax.top_k(scores[:, 1 : recommender.num_items + 1], k)[1] + 1

    def best(queries: np.ndarray, k: int) -> np.ndarray:
        return np.concatenate([best_of(read, queries[i : i + rows], k) for i in range(0, len(queries), rows)])

    found = write_index(folder / INDEX, _item_table(recommender), recommender.hidden(histories), best)
    return {
        "file": INDEX,
        "library": "usearch",
        "version": _version("usearch"),
        "metric": "ip",
        "keys": "item indices from 1",
        f"recall_at_{RECALL_AT}": found.recall,
        "expansion_search": found.expansion_search,
        "queries": found.queries,
        **({"seen_bias": float(apply_method(model, read, "seen_bias"))} if model.config.seen_bias else {}),
    }


def _write_items(recommender: Recommender, file: pathlib.Path) -> None:
    n, rows = recommender.num_items, _item_table(recommender)[1:]
    table = pl.DataFrame(
        {
            "index": np.arange(1, n + 1, dtype=np.int32),
            "item_id": recommender.id_column,
            "title": recommender.title_column,
            "training_events": recommender.training_counts[1:],
            "embedding": pl.Series(rows, dtype=pl.Array(pl.Float32, rows.shape[1])),
        }
    )
    table.write_parquet(file)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a checkout that is not installed


def _description(recommender: Recommender, k: int, platforms: Sequence[str]) -> dict[str, Any]:
    """What export.json says first, of the export as a whole."""
    return {
        "format": EXPORT_FORMAT,
        "made_with": {name: _version(name) for name in ("tim4rec_jax", "jax")},
        "run": recommender.config.name,
        "model": dataclasses.asdict(recommender.config.model),
        "platforms": list(platforms),
        "k": k,
        "max_len": recommender.max_len,
        "num_items": recommender.num_items,
        "sizes": {
            "b": "histories of a call, at least 1",
            "s": "items to leave out, at least 1",
            "h": "items of the longest history",
        },
        "order": "arrays of a dictionary follow each other by sorted name",
    }


def _new_folder(output: pathlib.Path) -> pathlib.Path:
    output = pathlib.Path(output).absolute()
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another folder, or remove this one")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to write {output.name} to")
    return output


def export_model(
    recommender: Recommender,
    output: pathlib.Path,
    *,
    k: int,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    allowed: np.ndarray | None = None,
    ann: bool = False,
) -> dict[str, Any]:
    """Writes a folder from which the model runs with JAX and NumPy alone.

      recommend.jax_export   histories in, the k best items out; static length of the recommender's max_len, any batch
      step.jax_export        causal models: states and one event each in, states and hidden states out
      top_k.jax_export       causal models: hidden states in, the k best items out
      parameters.npz         the arrays that every program takes first, as a dictionary
      items.parquet          index, item_id, title, training_events (the popularity), embedding (float32) of every item
      allowed.npy            bool [items + 1]: the items that the rules of the export leave
      encode.jax_export      with `ann`: histories in, hidden states out
      items.usearch          with `ann`: index of all items, asked with hidden states
      export.json            inputs and outputs of the programs: names, shapes, dtypes, meaning

    The parameters are an input and no constants, so that all programs share them, and programs stay small and need not
    be written again after training on.

    Args:
      recommender: the run's model, parameters and items.
      output: the folder; must not exist.
      k: items of a list.
      platforms: what the programs can run on, of `PLATFORMS`.
      allowed: bool [v], the items that may be recommended; None for all.
      ann: also an index for approximate search, see `item_index`.

    Returns:
      The content of export.json.

    Raises:
      FileExistsError: `output` is there.
      FileNotFoundError: the folder that should hold it is not.
      ValueError: for a k under 1 or over the catalogue, an unknown platform, or an index that finds too little.
      ModuleNotFoundError: usearch is not installed, and `ann` asks for it.
    """
    if ann:
        require_usearch()
    output = _new_folder(output)
    check_top_k((k,), recommender.num_items)
    if not platforms or set(platforms) - set(PLATFORMS):
        raise ValueError(f"platforms={tuple(platforms)}: expected some of {PLATFORMS}")
    with locked(output), replacing_folder(output) as temporary:
        programs = {
            name: _export(name, program, platforms, temporary)
            for name, program in _programs(recommender, k, ann=ann).items()
        }
        arrays = {name: np.asarray(leaf) for name, leaf in flat_arrays(recommender.params).items()}
        np.savez(temporary / PARAMETERS, **arrays)  # pyright: ignore[reportArgumentType]
        _write_items(recommender, temporary / ITEMS)
        every = np.arange(recommender.num_items + 1) > 0
        np.save(temporary / ALLOWED, every if allowed is None else allowed)
        description = _description(recommender, k, platforms) | {
            "parameters": {"file": PARAMETERS, "arrays": _described(arrays)},
            "items": {"file": ITEMS, "columns": ["index", "item_id", "title", "training_events", "embedding"]},
            "allowed": {"file": ALLOWED, **_described(every)},
            "programs": programs,
        }
        if ann:
            description["ann"] = _write_index(recommender, temporary)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description
