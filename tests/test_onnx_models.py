"""NumPy code to ONNX: what the page in the documentation does, and how long a model is."""

import re
from pathlib import Path

import numpy as np
import pytest

import anynorm

pytestmark = pytest.mark.cells("ndonnx")


def test_the_page_does_what_it_says():
    page = Path(__file__).parents[1].joinpath("docs", "onnx.md").read_text()
    parts = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(parts) == 4
    exec("\n".join(parts), {})


def nodes(function, shape):
    import ndonnx

    x = ndonnx.argument(shape=shape, dtype=ndonnx.float32)
    model = ndonnx.build({"x": x}, {"y": function(x)})
    return len([node for node in model.graph.node if node.op_type != "Constant"])


@pytest.mark.parametrize(
    ("norm", "shape", "axes"),
    [
        (anynorm.layer_norm, ("N", 8), (1,)),
        (anynorm.layer_norm, ("N", "L"), (1,)),
        (anynorm.batch_norm, ("N", 8, "L"), (0, 2)),
        (anynorm.instance_norm, ("N", 8, "L"), (2,)),
        (anynorm.rms_norm, ("N", 8), (1,)),
    ],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_a_model_has_at_most_one_and_a_half_times_the_nodes_of_the_formula(norm, shape, axes):
    import ndonnx

    one = ndonnx.asarray(np.ones(8, np.float32))
    beside = one[None, :, None] if len(shape) == 3 else one[None, :]

    def formula(x):
        d = x if norm is anynorm.rms_norm else x - ndonnx.mean(x, axis=axes, keepdims=True)
        return d / ndonnx.sqrt(ndonnx.mean(d * d, axis=axes, keepdims=True) + 1e-5) * beside + beside

    assert nodes(lambda x: norm(x, one, one), shape) <= 1.5 * nodes(formula, shape)
