"""One of several processes of torch.distributed, for `test_all_reduce.py`: rank, sizes of the shards, store, task."""

import json
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import anynorm


def compare(rank: int, sizes: list[int]) -> None:
    """Every result and gradient of this rank's samples, against those of the whole batch in this process alone."""
    generator = torch.Generator().manual_seed(0)
    n = sum(sizes)
    x, dy = (torch.randn(n, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    gamma, beta = (torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2))
    masks = [None, torch.rand(n, 1, 4, generator=generator) > 0.3]
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    for mask in masks:
        if mask is not None:
            x, dy = torch.where(mask, x, torch.nan), torch.where(mask, dy, 0)
        found = derivatives(x[own], dy[own], gamma, beta, None if mask is None else mask[own], dist.all_reduce)
        expected = derivatives(x, dy, gamma, beta, mask, None)
        for name, each in expected.items():
            each = each[own] if each.shape[0] == n else each
            torch.testing.assert_close(found[name], each, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)
        y, pullback = anynorm.vjp(
            anynorm.batch_norm,
            x[own],
            gamma,
            beta,
            all_reduce=dist.all_reduce,
            weights=None if mask is None else mask[own],
        )
        for name, each in zip(("dx", "dgamma", "dbeta"), pullback(dy[own]), strict=True):
            torch.testing.assert_close(found[name], each, rtol=1e-10, atol=1e-10)


def page() -> None:
    """What the documentation writes, on a batch of which this rank has its part."""
    text = (Path(__file__).parents[1] / "docs" / "masks.md").read_text()
    section = re.search(r"^### torch.distributed$(.*?)^### ", text, re.MULTILINE | re.DOTALL)[1]
    step, hooks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    world = dist.get_world_size()
    every = torch.randn(world, 2, 3, generator=torch.Generator().manual_seed(1))
    x, gamma, beta = every[dist.get_rank()].clone().requires_grad_(), torch.ones(3), torch.zeros(3)
    names = {"anynorm": anynorm, "x": x, "dy": torch.ones(2, 3), "gamma": gamma, "beta": beta}
    for parameter in (gamma, beta):
        parameter.requires_grad_()
    exec(step, names)
    torch.testing.assert_close(beta.grad, torch.full((3,), 2.0 * world))
    beta.grad = None
    exec("import torch.distributed as dist\n" + hooks + step, names)
    torch.testing.assert_close(beta.grad, torch.full((3,), 2.0))  # the mean over the replicas is this, too
    joined = anynorm.batch_norm(every.reshape(-1, 3)).reshape(every.shape)[dist.get_rank()]
    torch.testing.assert_close(names["y"].detach(), joined)


def derivatives(x, dy, gamma, beta, mask, all_reduce):
    """First ones by autograd, and a second one."""
    x, gamma, beta = (each.clone().requires_grad_() for each in (x, gamma, beta))
    y, moments = anynorm.batch_norm(x, gamma, beta, weights=mask, return_moments=True, all_reduce=all_reduce)
    dx, dgamma, dbeta = torch.autograd.grad(y, (x, gamma, beta), dy, retain_graph=True)
    (recorded,) = torch.autograd.grad(y, x, dy, create_graph=True)
    second, of_gamma = torch.autograd.grad(recorded.square().sum(), (x, gamma))
    if all_reduce is not None:
        all_reduce(of_gamma)  # parameters of a second derivative are those of this process
    return {
        "y": y.detach(), "dx": dx, "dgamma": dgamma, "dbeta": dbeta, "recorded": recorded.detach(), "second": second,
        "of_gamma": of_gamma, "mean": moments.mean, "var": moments.var,
    }  # fmt: skip


def survive(rank: int) -> None:
    """The second process is killed in the middle of a step, and the first must hear of it."""
    x = torch.ones(2, 3)
    anynorm.batch_norm(x, all_reduce=dist.all_reduce)
    if rank == 1:
        os._exit(9)
    try:
        anynorm.batch_norm(x, all_reduce=dist.all_reduce)
    except Exception as error:
        print(type(error).__name__, error)
        os._exit(0)


if __name__ == "__main__":
    rank, sizes, store, what = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60)
    )
    if what == "die":
        survive(rank)
    compare(rank, sizes)
    page()
    dist.barrier()
    dist.destroy_process_group()
