"""Gradients in fp32, summed where Adam reads them.

DeepSpeed's optimizer for fp32 copies each gradient into a bucket, from there to the others that this rank owns, and all
of these once more into one flat tensor. Here a gradient, reduced or not, is copied once, into its place in that flat
tensor, and given back at once; without data parallelism there is no bucket. The sums are the same to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor, nn


class FlatGradients:
    """Of an engine whose weights are fp32: this rank's partition of the gradients, a flat tensor a parameter group,
    from the first gradient of a step to Adam. It becomes part of DeepSpeed's optimizer, which has room for flat
    gradients, but uses it for others.

    keeps: parameters whose gradient stays beside them until the last micro batch is done, since others add to it.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, keeps: list[nn.Parameter]) -> None:
        self._optimizer, self._keeps = optimizer, {id(parameter) for parameter in keeps}
        self._ranks = [torch.distributed.get_rank(group) for group in optimizer.real_dp_process_group]
        self._untouched: list[set[int]] = [set() for _ in self._ranks]  # of what the flat tensor has: still undefined
        self._step = optimizer.step
        overrides: dict[str, Any] = {
            "_use_compact_grad_partition_buffer": lambda group: True,
            # What a bucket has of a rank stays one message: it is taken out of the bucket when that has come back.
            "_get_compact_grad_partition_slice": lambda *_: None,
            "_build_compact_grad_partition_buffer": self._made,
            "copy_grads_in_partition": self.take,
            "step": self._complete_and_step,
        }
        if all(torch.distributed.get_world_size(group) == 1 for group in optimizer.real_dp_process_group):
            optimizer.contiguous_gradients = False  # so no bucket is made
            overrides["process_gradients"] = self._take_at_once
            overrides["reduce_independent_p_g_buckets_and_remove_grads"] = self.take
        for name, method in overrides.items():
            setattr(optimizer, name, method)

    @torch.no_grad()
    def take(self, parameter: nn.Parameter, group: int) -> None:
        """Move a parameter's gradient, of which this rank owns a part, into the flat tensor."""
        assert parameter.grad is not None
        sums: GradPartitionBufferGroup = self._optimizer._get_compact_grad_partition_buffer(group)
        number = self._optimizer.get_param_id(parameter)
        ours, place = self._places(parameter, group)
        gradient, sum_ = parameter.grad.view(-1)[ours], sums.flat_partition[place]
        if number in self._untouched[group]:
            self._untouched[group].remove(number)
            sum_.copy_(gradient)
        else:
            sum_.add_(gradient)
        parameter.grad = None

    def _take_at_once(self, parameter: nn.Parameter, group: int) -> None:
        if id(parameter) not in self._keeps:
            self.take(parameter, group)

    def _places(self, parameter: nn.Parameter, group: int) -> tuple[slice, slice]:
        """The part of a parameter's entries that this rank owns, and where these lie in the partition."""
        optimizer, rank = self._optimizer, self._ranks[group]
        number = optimizer.get_param_id(parameter)
        first = optimizer.grad_start_offset[group][rank][number]
        start = optimizer.grad_partition_insertion_offset[group][rank][number]
        count = min(parameter.numel() - first, optimizer.partition_size[group] - start)
        return slice(first, first + count), slice(start, start + count)

    def _made(self, group: int) -> GradPartitionBufferGroup:
        """The flat tensor, with a view of each parameter's part; what no parameter fills is 0."""
        optimizer = self._optimizer
        owned = optimizer.params_in_partition[group]
        flat = torch.empty(int(optimizer.partition_size[group]), device=optimizer.device)
        self._untouched[group] = {optimizer.get_param_id(parameter) for parameter in owned}
        views: list[Tensor] = []
        end = 0
        for parameter in owned:
            _, place = self._places(parameter, group)
            flat[end : place.start].zero_()
            views.append(flat[place])
            end = place.stop
        flat[end:].zero_()
        return GradPartitionBufferGroup(views, flat)

    def _complete_and_step(self, *args: Any) -> Any:
        for group, left in enumerate(self._untouched):
            for parameter in self._optimizer.params_in_partition[group] if left else ():
                if self._optimizer.get_param_id(parameter) in left:
                    _, place = self._places(parameter, group)
                    self._optimizer.averaged_gradients[group].flat_partition[place].zero_()
            left.clear()
        return self._step(*args)


def flatten_gradients(engine: Any) -> None:
    """Let DeepSpeed's `engine` gather its gradients as `FlatGradients` does, where weights and gradients are fp32."""
    optimizer, module = engine.optimizer, engine.module
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.dtype == torch.float32:
        summed = module.get_tied_weights_and_groups() if isinstance(module, PipelineModule) else []
        FlatGradients(optimizer, [weight for weight, _ in summed])
