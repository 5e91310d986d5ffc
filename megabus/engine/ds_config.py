"""The DeepSpeed JSON of a stage, generated from the run's configuration and written nowhere else."""

from __future__ import annotations

from typing import Any

from megabus.config import RunConfig, Stage


def deepspeed_config(config: RunConfig, stage: Stage) -> dict[str, Any]:
    train = config.train
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": stage.micro_batch_size,
        "gradient_accumulation_steps": stage.grad_accum,
        "train_batch_size": stage.global_batch_size,
        "gradient_clipping": train.gradient_clipping,  # always: DeepSpeed's own default is 1.0
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": train.zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "overlap_comm": False,
        },
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if train.precision == "bf16":
        tree["bf16"] = {"enabled": True}
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree
