"""Writes a run's best model as programs that run with JAX and NumPy alone (StableHLO by jax.export).

    python -m experiments.export --run=runs/ml1m --output=exported --k=50

The folder holds recommend.jax_export (histories in, the k best items out; any number of histories a call), for causal
models also step.jax_export and top_k.jax_export (states in, states out), the parameters and the items with their raw
ids, embeddings and titles, and export.json, which says what goes in and what comes out. To run it:

    program = jax.export.deserialize(pathlib.Path("exported/recommend.jax_export").read_bytes())
    parameters = dict(numpy.load("exported/parameters.npz"))
    allowed = numpy.load("exported/allowed.npy")    # what --allow, --deny and --where leave; any other mask will do
    best, scores = program.call(parameters, items, lengths, timestamps, excluded, allowed)

With --ann=usearch there is an index of all items for catalogues that are too large to rank whole, and encode.jax_export
for what it is asked with; scores are inner products, and what rules leave out is taken from a longer list:

    index = usearch.index.Index.restore("exported/items.usearch")
    index.expansion_search = description["ann"]["expansion_search"]
    nearest = index.search(numpy.asarray(encode.call(parameters, items, lengths, timestamps)), 10).keys

A model with the seen bias gives items of the history description["ann"]["seen_bias"] beside their inner product: search
for as many more as the history holds, join its own items, add that number to theirs, and sort.

`excluded` holds what a user has seen, if that is to be left out. items.parquet has the embeddings, whose cosines say
which items are alike, and training_events, the popularity, for users without a history.
JAX promises to read such files for six months after the release that wrote them; export anew after that.
"""

import pathlib
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from experiments.cli import note, parse_settings, program, table
from tim4rec_jax.serving.export import export_model
from tim4rec_jax.serving.item_index import RECALL_AT
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.rules import RuleOptions, rules_from_options


@dataclass(frozen=True)
class Arguments(RuleOptions):
    """Writes a run's best model as programs that run without this library.

    Attributes:
      run: the run folder.
      output: folder to write; must not exist.
      k: items of a list.
      ann: library of an index for approximate search, whose recall is measured; None for none.
      platforms: what the programs can run on, some of cpu, cuda, rocm and tpu.
    """

    run: pathlib.Path
    output: pathlib.Path
    k: int = 10
    ann: Literal["usearch"] | None = None
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")


def run(arguments: Arguments) -> Table:
    """Exports as asked; returns a table of what was written.

    Raises:
      FileNotFoundError, FileExistsError, ValueError, CheckpointError: the run cannot be read, the folder is there, or
        the settings do not fit.
    """
    for name in ("exclude_seen", "unknown_users"):
        default = getattr(RuleOptions, name)
        if getattr(arguments, name) != default:
            raise ValueError(f"--{name} is decided at every call of an exported program, not here; leave it out")
    recommender = Recommender.from_run(arguments.run, report=note)
    rules = rules_from_options(arguments, recommender.index_of_item, report=note)
    description = export_model(
        recommender,
        arguments.output,
        k=arguments.k,
        platforms=arguments.platforms,
        allowed=rules.allowed,
        ann=arguments.ann is not None,
    )
    calls = {written["file"]: written["call"] for written in description["programs"].values()}
    rows = [
        (file.name, f"{file.stat().st_size / 1000:,.1f}", calls.get(file.name, ""))
        for file in sorted(arguments.output.iterdir())
    ]
    title = f"{arguments.output}, for {', '.join(description['platforms'])}"
    caption = ""
    if index := description.get("ann"):
        caption = (
            f"{index['file']}: recall@{RECALL_AT} {index[f'recall_at_{RECALL_AT}']:.4f} after {index['queries']:,} "
            f"users' histories, with expansion_search={index['expansion_search']}"
        )
    return table(("file", "KB", "call"), rows, title=title, caption=caption, left=(0, 2))


@program
def main(argv: list[str]) -> int:
    """Exports as asked."""
    Console().print(run(parse_settings(Arguments, argv, prog="experiments.export")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
