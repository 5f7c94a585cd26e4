"""ONNX's own node tests, run through ONNX's reference evaluator with its norms replaced by ours."""

import re
import warnings
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import pytest

import anynorm

pytestmark = pytest.mark.cells("numpy", "torch")

WANTED = {
    "batchnorm": 4,
    "group_normalization": 2,
    "instancenorm": 2,
    "layer_normalization": 19,
    "rms_normalization": 19,
    "mvn": 1,
}


def node_tests():
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the examples that are made overflow, some of them
        for module in iter_modules(node.__path__, f"{node.__name__}."):  # its own loader makes all of them
            if "norm" in module.name:
                import_module(module.name)
    kinds = "|".join(WANTED)
    # the expanded variants hold only primitives, and never reach a norm
    return [
        test
        for test in node._NodeTestCases
        if re.match(rf"test_({kinds})(_|$)", test.name) and "expanded" not in test.name
    ]


def operators(backend, calls):
    """ONNX's operators, in this library."""
    from onnx.reference.op_run import OpRun

    def ours(name):
        def decorate(function):
            def run(self, *inputs, **attributes):
                calls.append(name)
                dtype = inputs[0].dtype
                arrays = [backend.array(each, str(each.dtype)) for each in inputs]
                if "momentum" in attributes:  # NumPy's scalars are no numbers to array-api-strict
                    attributes["momentum"] = float(attributes["momentum"])
                results = function(*arrays, **attributes)
                results = results if isinstance(results, tuple) else (results,)
                return tuple(
                    (each if isinstance(each, np.ndarray) else backend.numpy(each)).astype(dtype) for each in results
                )

            return type(name, (OpRun,), {"op_domain": "", "_run": run})

        return decorate

    @ours("BatchNormalization")
    def batch(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
        running = anynorm.RunningStats(mean, var, momentum=momentum)
        if not training_mode:
            return anynorm.batch_norm(x, scale, bias, eps=epsilon, moments=running)
        y, moments = anynorm.batch_norm(x, scale, bias, eps=epsilon, return_moments=True)
        running = running.update(moments)
        return y, running.mean, running.var

    @ours("GroupNormalization")
    def group(x, scale, bias, *, epsilon=1e-5, num_groups, stash_type=1):
        return anynorm.group_norm(x, scale, bias, groups=num_groups, eps=epsilon)

    @ours("InstanceNormalization")
    def instance(x, scale, bias, *, epsilon=1e-5):
        return anynorm.instance_norm(x, scale, bias, eps=epsilon)

    @ours("LayerNormalization")
    def layer(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
        axes = tuple(range(axis % x.ndim, x.ndim))
        y, moments = anynorm.layer_norm(x, scale, bias, axis=axes, eps=epsilon, return_moments=True)
        mean, var = (backend.numpy(each) for each in (moments.mean, moments.var))
        shape = (*mean.shape, *(1,) * len(axes))
        return y, mean.reshape(shape), 1 / np.sqrt(var.reshape(shape) + epsilon)

    @ours("RMSNormalization")
    def rms(x, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
        return anynorm.rms_norm(x, scale, axis=tuple(range(axis % x.ndim, x.ndim)), eps=epsilon)

    @ours("MeanVarianceNormalization")
    def mvn(x, *, axes=(0, 2, 3)):
        return anynorm.normalize(x, axis=tuple(axes), eps=0)

    return [batch, group, instance, layer, rms, mvn]


@pytest.fixture(scope="module")
def suite():
    return node_tests()


@pytest.mark.parametrize("kind", WANTED)
def test_onnx_node_tests_pass(backend, suite, kind):
    from onnx.reference import ReferenceEvaluator

    chosen = [test for test in suite if test.name.startswith(f"test_{kind}")]
    assert len(chosen) == WANTED[kind]
    chosen = chosen if backend.library == "numpy" else chosen[::4]
    calls = []
    for test in chosen:
        evaluator = ReferenceEvaluator(test.model, new_ops=operators(backend, calls))
        for inputs, expected in test.data_sets:
            names = [each.name for each in test.model.graph.input]
            found = evaluator.run(None, dict(zip(names, inputs, strict=True)))
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=test.rtol, atol=1e-6, err_msg=test.name)
                assert ours.dtype == theirs.dtype
    assert len(calls) == len(chosen), "a norm was not replaced"
