"""The DeepSpeed JSON of a stage, made from the run's settings and written nowhere."""

from __future__ import annotations

from typing import Any

from megabus.config import Stage
from megabus.config.schema import TrainConfig

BUCKET_ENTRIES = 50_000_000  # of gradients, that DeepSpeed's buckets have room for


def deepspeed_config(train: TrainConfig, stage: Stage) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": stage.grad_accum,
        "train_batch_size": stage.global_batch_size,
        "gradient_clipping": train.gradient_clipping,  # always: DeepSpeed's own default is 1.0
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro batch, for nobody
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": train.zero_stage,
            # For what DeepSpeed reduces in buckets, which its optimizer for bf16 with ZeRO-1 and its pipeline do not.
            "reduce_bucket_size": BUCKET_ENTRIES,
            "allgather_bucket_size": BUCKET_ENTRIES,
            "overlap_comm": train.overlap_comm,
        },
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if train.precision == "bf16":
        # Gradients go into their fp32 sum as soon as each is there, not after the backward pass: none is kept in bf16.
        tree["bf16"] = {"enabled": True, "immediate_grad_update": True}
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
        # DeepSpeed would add the fp32 sums of the data-parallel ranks in bf16: an error that grows with dp.
        tree["communication_data_type"] = "fp32"
    return tree
