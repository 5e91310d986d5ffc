"""Ranks begin together, and leave the process group together, however long rank 0 still has to say something."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from megabus.engine import startup
from megabus.engine.startup import start_distributed, stop_distributed
from megabus.errors import UserError
from megabus.testing.ranks import run_ranks

HANG = timedelta(seconds=1)


def _leave(barrier):
    """The others come 2.5 seconds before rank 0, with a group whose operations end after one."""
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(HANG, dist.group.WORLD)
    if dist.get_rank() == 0:
        time.sleep(2.5)
    try:
        dist.barrier() if barrier else stop_distributed()
    except RuntimeError as error:
        return type(error).__name__
    return None


def test_a_slow_last_word_is_waited_for():
    assert run_ranks(2, _leave, False) == [None, None]
    assert run_ranks(2, _leave, True)[1] is not None  # negative control: the run's own group does not


def test_no_rank_begins_before_all_have_met(monkeypatch):
    """Else one without a message to send leaves while a slower one still connects, which takes it for dead."""
    met = []
    join = dist.init_process_group

    def late(*args, rank, **options):
        join(*args, rank=rank, **options)
        time.sleep(0.5 * rank)
        met.append(time.monotonic())

    monkeypatch.setattr(dist, "init_process_group", late)
    began, last = zip(*run_ranks(3, lambda: (time.monotonic(), met[0])), strict=True)
    assert min(began) >= max(last)
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)  # negative control
    began, last = zip(*run_ranks(3, lambda: (time.monotonic(), met[0])), strict=True)
    assert min(began) < max(last)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "The client socket has timed out after 1000ms while trying to connect to (a, 1)",
            "rank 0 has not answered there",
        ),
        (
            "The server socket has failed to listen on any local network address",
            "the ranks cannot meet there (The server",
        ),
    ],
)
def test_a_port_is_blamed_only_where_it_is_at_fault(monkeypatch, said, told):
    def fail(*_, **options):
        raise dist.DistNetworkError(said)

    monkeypatch.setattr(sys.modules["torch.distributed.rendezvous"], "rendezvous", fail)  # torch has it as a function
    monkeypatch.setattr(startup, "on_gpu", lambda: False)
    monkeypatch.setenv("MASTER_ADDR", "a")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match=r"^MASTER_ADDR:MASTER_PORT = a:1: ") as caught:
        start_distributed(timedelta(seconds=60))
    assert caught.value.problem.startswith(told)
    assert ("free port" in caught.value.remedy) == ("failed" in said)


def test_nccl_is_not_bound_to_a_device_and_connects_all_ranks_at_once(monkeypatch):
    """Bound, it would split every group off the whole world; unconnected, the first message between two ranks would
    wait for all the others."""
    import deepspeed

    done = []
    store = SimpleNamespace(set_timeout=lambda _: None)
    monkeypatch.setattr(startup, "on_gpu", lambda: True)
    monkeypatch.setattr(startup, "import_deepspeed", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: done.append(("device", number)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(
        sys.modules["torch.distributed.rendezvous"], "rendezvous", lambda *_, **__: iter([(store, 0, 2)])
    )
    monkeypatch.setattr("megabus.parallel.reach.check_reach", lambda *_: done.append("reach"))
    monkeypatch.setattr("megabus.parallel.mesh.reuse_process_groups", lambda _: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: done.append((backend, sorted(options))))
    monkeypatch.setattr(deepspeed, "init_distributed", lambda backend, **_: done.append(f"DeepSpeed on {backend}"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: device)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: done.append(f"all-reduce on {tensor}"))
    start_distributed(timedelta(seconds=60))
    options = ["rank", "store", "timeout", "world_size"]
    assert done == [("device", 0), "reach", ("nccl", options), "DeepSpeed on nccl", "all-reduce on cuda"]


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_a_gradient_in_bf16_is_added_to_its_sum_without_a_copy():
    """The bits are those of the sum with an fp32 copy, which DeepSpeed would make."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.zeros(5, 3, dtype=torch.bfloat16).requires_grad_()
    weight.grad = torch.randn(5, 3, generator=draw).bfloat16()
    sums = [torch.zeros(1), torch.randn(15, generator=draw)]
    wanted = sums[1] + weight.grad.float().view(-1)
    optimizer = SimpleNamespace(fp32_groups_gradients=[[], sums], fp32_groups_has_gradients=[[], [False, False]])
    with Operations() as seen:
        BF16_Optimizer._update_hp_grad(optimizer, weight, 1, 1, False)
    assert torch.equal(sums[1], wanted)
    assert weight._hp_grad is sums[1]
    assert optimizer.fp32_groups_has_gradients == [[], [False, True]]
    assert set(seen.names) == {"view", "add_"}
    weight.grad = None
    BF16_Optimizer._update_hp_grad(optimizer, weight, 1, 0, False)
    assert not optimizer.fp32_groups_has_gradients[1][0]
