"""What Dask's graphs are made of here: maps over chunks, reductions over them, and an array that is made a second time.

The chunks in between may be anything; an array's `_meta` then says what they become in the end.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from anynorm.kernels import Array

STATISTICS = "anynorm-statistics"
"""What the names of merged statistics begin with: they are small, and are never made twice."""
MANY = 8


def map_chunks(task: Callable[..., Any], x: Array, *others: Array | None, dtype: Any = None, axes: Any = ()) -> Array:
    """The task on each chunk of x and those of the others; what it gives is of length 1 along `axes`."""
    inds = tuple(range(x.ndim))
    pairs = [each for array in (x, *others) for each in (array, None if array is None else inds)]
    meta = x._meta if dtype is None else x._meta.astype(dtype)
    how = {"adjust_chunks": dict.fromkeys(axes, 1), "align_arrays": False, "meta": meta, "token": "anynorm"}
    blocks: Array = _dask("array").blockwise(task, inds, *pairs, **how)
    return blocks


def reduce_chunks(
    combine: Callable[[list[Any]], Any],
    x: Array,
    axes: tuple[int, ...],
    *,
    of: Callable[[Any], Any] | None = None,
    dtype: Any = None,
    name: str = "anynorm-sum",
) -> Array:
    """The chunks along some axes, or something `of` each, combined in a tree to one of length 1."""
    meta = x._meta if dtype is None else x._meta.astype(dtype)
    chunk, together = partial(_of_chunk, of), partial(_of_list, combine)
    how = {"keepdims": True, "concatenate": False, "dtype": meta.dtype, "meta": meta, "name": name}
    tree: Array = _dask("array").reduction(x, chunk, together, axis=axes, **how)
    return tree


def _of_chunk(of: Callable[[Any], Any] | None, chunk: Any, axis: Any, keepdims: bool) -> Any:  # noqa: ARG001
    return chunk if of is None else of(chunk)


def _of_list(combine: Callable[[list[Any]], Any], parts: Any, axis: Any, keepdims: bool) -> Any:  # noqa: ARG001
    return combine(list(_dask("core").flatten([parts])))


def again(x: Array, after: Array) -> Array:
    """x by other names, but for the statistics that it rests on, and for data that is there already.

    Its chunks are not made before `after` is known, which they would only wait for. Where `after` is many chunks, few
    others wait for each, and one may be asked for without the rest.
    """
    # not dask.graph_manipulation.clone, which leaves a slice or a rechunked array on the chunks that it was made of
    graph, seed = x.dask, after.name
    names = _layers_to_clone(x)
    if not names:
        return x
    rename = partial(_dask("base").clone_key, seed=seed)
    keys = {key for name in names for key in graph.layers[name].get_output_keys()}
    external, graphs, bind_to = graph.get_all_external_keys(), [graph], None
    if after.npartitions <= MANY:
        blocker = _dask("graph_manipulation").checkpoint(after)
        graphs, bind_to = [graph, blocker.dask], blocker.key
    layers, dependencies = {}, {}
    for name in names:
        layer = graph.layers[name]
        if isinstance(layer, _dask("blockwise").Blockwise):
            layer, bound = layer.clone(keys, seed, bind_to)
        else:
            layer, bound = _clone(layer, keys, external, rename, bind_to)
        layers[rename(name)] = layer
        dependencies[rename(name)] = {rename(other) if other in names else other for other in graph.dependencies[name]}
        dependencies[rename(name)] |= {bind_to} if bound else set()
    new = _dask("highlevelgraph").HighLevelGraph
    return type(x)(new.merge(*graphs, new(layers, dependencies)), rename(x.name), x.chunks, meta=x._meta)


def _layers_to_clone(x: Array) -> list[str]:
    """The names of the layers below x, down to statistics and data that is there."""
    names, waiting = dict[str, None](), [x.name]
    while waiting:
        name = waiting.pop()
        if name not in names and not name.startswith(STATISTICS) and not _is_data(x.dask.layers[name]):
            names[name] = None
            waiting += sorted(x.dask.dependencies[name])
    return list(names)


def _is_data(layer: Any) -> bool:
    """Whether a layer is data, here or on a cluster, which need not be made; or shuffled by the cluster itself."""
    if isinstance(layer, _dask("blockwise").Blockwise):
        return False
    spec = _dask("_task_spec")
    return type(layer).__module__.startswith("distributed") or all(
        isinstance(node, spec.DataNode) or not isinstance(node, (spec.GraphNode, tuple)) for node in layer.values()
    )


def _clone(layer: Any, keys: set[Any], external: set[Any], rename: Callable[..., Any], bind_to: Any) -> Any:
    """As `Blockwise.clone`: the tasks by other names; those that rest on no renamed task wait for `bind_to`."""
    spec, tasks, bound = _dask("_task_spec"), {}, False
    for key, node in spec.convert_legacy_graph(dict(layer), all_keys=external).items():
        others = {other: rename(other) for other in node.dependencies if other in keys}
        task = node.substitute(others, key=rename(key))
        if bind_to is not None and not others:
            task, bound = spec.Task(rename(key), _first, task, spec.TaskRef(bind_to)), True
        tasks[rename(key)] = task
    return _dask("highlevelgraph").MaterializedLayer(tasks), bound


def _first(value: Any, _: Any) -> Any:
    return value


def _dask(module: str) -> Any:
    return import_module(f"dask.{module}")
