"""What a run may change when it resumes under `resume: strict`: where and how it computes, and last bits at most."""

from __future__ import annotations

FREE = ("run_dir", "resume", "layout", "log", "callbacks", "checkpoint", "preflight", "data")  # sections of the file
FREE_KEYS = (  # wherever they stand
    "layout",
    "micro_batch_size",
    "recompute",
    "overlap_comm",
    "sequence_parallel",
    "kernels",
    "buffer_mb",
    "deterministic",
    "ema",  # running means of the weights, which training never reads
    "extra",  # of eval: what else is measured
    "max_skips",
    "max_rollbacks",
    "hang_timeout",
    "stop_exit_code",
)
