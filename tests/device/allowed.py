"""All that may wait for the device: by what a run does, (how, place): how often at most.

What a step waits for stands after its last backward pass: whether the norm is finite, by which clipping and skipping
go, before Adam is queued; loss and norm themselves, once all is. DeepSpeed reads the norm again where megabus cannot
keep it from that; the device has nothing to do by then.
"""

from __future__ import annotations

Waits = dict[tuple[str, str], int]

ZERO, UTILS, PIPE = (f"deepspeed/runtime/{name}.py" for name in ("zero/stage_1_and_2", "utils", "pipe/engine"))

STEP: Waits = {
    ("tolist", "megabus/engine/engine.py:_read"): 1,
    (
        "item",
        f"{UTILS}:is_invalid_grad_norm",
    ): 3,  # ZeRO's optimizer: the whole norm, and for clipping each of two groups
    ("item", f"{UTILS}:clip_tensors_by_global_norm"): 1,  # bf16's
    ("item", f"{ZERO}:has_overflow"): 1,  # bf16 with ZeRO-2
    ("copy to GPU", f"{UTILS}:mask_nan_or_inf_with_val_inplace"): 2,  # the number -1, once a group
    ("copy to GPU", f"{PIPE}:_aggregate_total_loss"): 1,  # the last pipeline rank's number, told by it
}
BUILD: Waits = {
    ("synchronize", "megabus/parallel/mesh.py:new_group"): 5,  # before a communicator is made; each is made once
    ("copy to GPU", f"{PIPE}:__init__"): 4,
    ("tolist", f"{PIPE}:__init__"): 1,
}
GROWTH: Waits = BUILD | {
    ("item", "megabus/engine/adam.py:read_step"): 1,
    ("tolist", "megabus/growth/transition.py:grow_engine"): 1,  # bytes that were sent
    ("synchronize", f"{ZERO}:destroy"): 2,
}
ALLOWED: dict[str, Waits] = {
    "build": BUILD,
    "step": STEP,
    "growth": GROWTH,
    "initial weights": {},
    "evaluation": {
        ("item", "megabus/engine/engine.py:evaluate"): 1,
        ("copy to GPU", f"{PIPE}:_bcast_pipe_scalar"): 1,
    },
    "unit rows": {("item", "megabus/engine/engine.py:unit_error"): 1},
    "gains": {("tolist", "megabus/engine/gains.py:order_statistics"): 1},
    "memory": {("tolist", "megabus/train/environment.py:peak_memory"): 1},
    "agreement": {("tolist", "megabus/parallel/agree.py:on_any_rank"): 1},
    "snapshot": {("synchronize", "megabus/checkpoint/host_memory.py:copies"): 1},
}
