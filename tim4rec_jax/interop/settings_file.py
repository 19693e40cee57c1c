"""Settings files of the original programs: YAML of bounded size, depth and expansion."""

import itertools
import pathlib
from typing import Any

import yaml

from tim4rec_jax.checks import require, shortened, shown
from tim4rec_jax.interop.torch_checkpoint_file import require_file

_MOST_BYTES = 256 * 2**10
# Values of the file, those behind an alias counted again wherever the alias stands.
_MOST_VALUES = 10_000
_MOST_DEPTH = 20
_LONGEST = 1_000


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Returns the mapping of a YAML file; tags that would make objects are refused.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not YAML, holds something other than names and values, or is larger than settings are.
    """
    require_file(path, "settings file")
    name = shortened(str(path), 100)
    with path.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
    require(len(content) <= _MOST_BYTES, f"{name} has more than {_MOST_BYTES:,} bytes; give the model's settings alone")
    try:
        settings = _parse(content.decode("utf-8-sig"))
    except yaml.MarkedYAMLError as error:
        place = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{name} is not readable as YAML: {shortened(str(error.problem), 120)}{place}") from None
    except Exception as error:  # Some values that YAML itself cannot make end in whatever Python raises.
        raise ValueError(f"{name} is not readable as YAML: {shortened(str(error), 150)}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{name} holds a {type(settings).__name__} where names and values are expected")
    if other := [key for key in settings if not isinstance(key, str)]:
        raise ValueError(f"{name}: {shown(other[0])} is no name of a setting; put quotes around it, or leave it out")
    return settings


def _parse(text: str) -> Any:
    _require_small(text)
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        require(_expanded(node, {}) <= _MOST_VALUES, f"its aliases stand for more than {_MOST_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            names = sorted(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((name for name, after in itertools.pairwise(names) if name == after), None)
            require(twice is None, f"{shown(twice)} stands twice")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _require_small(text: str) -> None:
    """Refuses what the composer, which calls itself for every level, would take long for, or fail at."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        require(depth <= _MOST_DEPTH, f"lists and mappings lie more than {_MOST_DEPTH} deep")
        require(count <= 2 * _MOST_VALUES, f"more than {_MOST_VALUES:,} values")
        if isinstance(event, yaml.ScalarEvent):
            require(len(event.value) <= _LONGEST, f"a value has more than {_LONGEST:,} characters")


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node, itself included, as many times as aliases repeat them."""
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # Until it is known: a node that holds itself has no end.
        members = [] if isinstance(node, yaml.ScalarNode) else node.value
        flat = [part for member in members for part in (member if isinstance(member, tuple) else (member,))]
        known[id(node)] = min(1 + sum(_expanded(part, known) for part in flat), _MOST_VALUES + 1)
    return known[id(node)]
