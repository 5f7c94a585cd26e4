"""What an argument is called here, where a caller gave it another framework's name."""

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn, TypeVar, cast

CallableT = TypeVar("CallableT", bound=Callable[..., Any])


def checks_names(made: CallableT) -> CallableT:
    """The function, or the class by its constructor, that refuses unknown names and places with some advice."""
    parameters = inspect.signature(made).parameters.values()
    known = frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY)
    placed = sum(parameter.kind < parameter.VAR_POSITIONAL for parameter in parameters)
    most = sys.maxsize if any(each.kind is each.VAR_POSITIONAL for each in parameters) else placed
    most += isinstance(made, type)  # and self
    target: Any = made
    function = target.__init__ if isinstance(made, type) else target

    @wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        if not known.issuperset(options):
            refuse([name for name in options if name not in known], made)
        if len(arguments) > most:
            refuse_places(len(arguments) - most, made)
        return function(*arguments, **options)

    if not isinstance(made, type):
        return cast(CallableT, checked)
    target.__init__ = checked
    return made


def refuse_places(more: int, function: Callable[..., Any]) -> NoReturn:
    """A TypeError that says which arguments of the function have a place, where so many more were given."""
    every = inspect.signature(function).parameters.values()
    names = [each.name for each in every if each.kind < each.VAR_POSITIONAL and each.name not in ("self", "cls")]
    rule = f"{', '.join(names)} by position and its other arguments" if names else "its arguments"
    raise TypeError(f"{function.__name__} takes {rule} by name, got {len(names) + more} by position")


def refuse(names: Iterable[str], function: Callable[..., Any]) -> NoReturn:
    """A TypeError that says what each of these names is called in the function."""
    every = inspect.signature(function).parameters
    parameters = {name: parameter for name, parameter in every.items() if name not in ("self", "cls")}
    reasons = [f"no argument {name!s:.40}{_advice(name, parameters)}" for name in names]
    raise TypeError(f"{function.__name__} has {'; '.join(reasons[:8])}")


def _advice(name: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    if name in parameters:
        return " by name: it is passed by position"
    for argument, others in _NAMES.items():
        if argument in parameters and name.lower() in others.split():
            return f": it is {argument} here"
    for argument, others, advice in _ADVICE:
        if argument in parameters and name.lower() in others.split():
            return f": {advice}"
    return f": it takes {', '.join(parameters)}"


_TRAINING = (
    "training train is_training is_test test_mode inference use_running_average use_running_stats use_batch_stats "
    "track_running_stats use_global_stats use_input_stats deterministic"
)
_SIZES = "num_features features channels num_channels n_channels c size hidden_size embedding_dim d_model input_shape"

# the first that the function has is meant
_NAMES = {
    "channel_axis": "axis axes dim dims channel_dim channels_axis feature_axis data_format channels_last "
    "channels_first channel_last channel_first data_layout layout",
    "axis": "dim dims axes normalized_axes reduction_axes reduced_axes reduce_axes reduction_dims norm_axis norm_dim "
    "begin_norm_axis feature_axis feature_axes",
    "groups": "group num_groups n_groups ngroups group_count number_of_groups g",
    "eps": "epsilon variance_epsilon var_eps eps_value",
    "v": "weight weight_v direction kernel input w x",
    "g": "weight_g magnitude gain scale gamma",
    "w": "weight weights v kernel",
    "x": "input inputs tensor data array a",
    "gamma": "weight w scale gain gammas multiplier",
    "beta": "bias b offset shift betas",
    "weights": "mask masks where sample_weight sample_weights padding_mask attention_mask key_padding_mask "
    "frequency_weights fweights aweights",
    "out": "inplace in_place output",
    "return_moments": "return_stats return_statistics return_mean return_var return_mean_var output_mean_var",
    "all_reduce": "group process_group axis_name axis_index_groups synchronized sync reduce_fn",
    "mean": "running_mean moving_mean mu loc",
    "var": "running_var moving_var moving_variance variance",
    "count": "n size num_samples counts nobs",
    "momentum": "decay decay_rate",
    "debias": "zero_debias bias_correction",
    "factor": "weight scale times share",
    "correction": "ddof unbiased bessel",
    "shape": _SIZES,
    "like": "dtype device map_location x array prototype",
    "batches": "x arrays data dataset iterable loader",
    "threads": "num_threads n_threads nthreads workers num_workers max_workers n_jobs",
    "block_bytes": "block block_size blocksize chunk_size chunk_bytes",
    "states": "obj state_dict state data tensors arrays",
    "path": "f file filename fname fp filepath file_path path_or_file",
}
_ADVICE = [
    *((first, "channel_axis channel_dim", "give axis, the axes that share a mean, all but those of channels")
      for first in ("x", "y")),
    ("axis", "channel_axis channel_dim", "give axis"),
    ("axis", "normalized_shape", "give axis, the axes that are normalized"),
    ("moments", "momentum decay exponential_average_factor", "RunningStats has it, and update takes a batch's moments"),
    ("moments", "correction ddof unbiased", "RunningStats has it"),
    (
        "moments",
        "running_mean running_var moving_mean moving_var moving_variance mean var variance stats statistics "
        "running running_stats batch_stats state",
        "give moments, which RunningStats or Moments hold",
    ),
    ("moments", _TRAINING, "give moments for inference, and none to train"),
    ("x", _TRAINING, "it does the same in training and in inference"),
    ("x", "momentum decay running_mean running_var moving_mean moving_var moving_variance",
     "batch_norm alone has running statistics, as moments"),
    ("count", "momentum", "RunningStats has it"),
    ("count", "num_batches_tracked", "count is the number of values"),
    ("correction", "eps epsilon", "the norms take eps"),
    ("gamma", "affine elementwise_affine center use_scale use_bias scale_init bias_init",
     "give gamma and beta, or neither"),
    ("mean", _SIZES, "RunningStats.init takes their shape"),
    ("x", _SIZES, "the shape of x says it"),
    ("x", "keepdims keepdim keep_dims", "results have the shape of x, and moments that of the axes that are kept"),
    ("x", "dtype device", "results have those of x"),
]  # fmt: skip
