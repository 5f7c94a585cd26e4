"""What an argument is called here, where a caller gave it another framework's name."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
KindT = TypeVar("KindT", bound=type)


class Nothing:
    """In place of an argument that is missing: the checks refuse it as they do any other kind."""

    def __repr__(self) -> str:
        return "Nothing"


def checks_names(function: FunctionT) -> FunctionT:
    """The same function, which takes unknown names as ``**others`` to `refuse` them, and does not show that it does.

    Arguments that are missing become `Nothing`, so that a call reaches `refuse` also without them. There is no
    wrapper: a call takes as long as before, and compilers read the function itself.
    """
    signature = inspect.signature(function)
    *parameters, _ = signature.parameters.values()
    missing = {each.name: Nothing() for each in parameters if each.default is each.empty}
    by_name = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    made: Any = function
    made.__defaults__ = (*(missing[name] for name in missing if name not in by_name), *(made.__defaults__ or ()))
    made.__kwdefaults__ = (made.__kwdefaults__ or {}) | {name: missing[name] for name in missing if name in by_name}
    made.__signature__ = signature.replace(parameters=parameters)
    return function


def checks_fields(kind: KindT) -> KindT:
    """The same dataclass, whose constructor refuses unknown names."""
    made: Any = kind
    init, known = made.__init__, frozenset(inspect.signature(kind).parameters)

    @wraps(init)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        if not known.issuperset(options):
            refuse([name for name in options if name not in known], kind)
        init(self, *arguments, **options)

    made.__init__ = __init__
    return kind


def refuse(names: Iterable[str], function: Callable[..., Any]) -> NoReturn:
    """A TypeError that says what each of these names is called in the function."""
    parameters = inspect.signature(function).parameters
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
    "begin_norm_axis feature_axis feature_axes channel_axis",
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
    "correction": "ddof unbiased bessel",
    "num_channels": _SIZES + " shape",
    "like": "dtype device map_location x array prototype",
    "batches": "x arrays data dataset iterable loader",
    "threads": "num_threads n_threads nthreads workers num_workers max_workers n_jobs",
    "block_bytes": "block block_size blocksize chunk_size chunk_bytes",
    "states": "obj state_dict state data tensors arrays",
    "path": "f file filename fname fp filepath file_path path_or_file",
}
_ADVICE = [
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
    ("mean", _SIZES, "RunningStats.init takes num_channels"),
    ("x", _SIZES, "the shape of x says it"),
    ("x", "keepdims keepdim keep_dims", "results have the shape of x, and moments that of the axes that are kept"),
    ("x", "dtype device", "results have those of x"),
]  # fmt: skip
