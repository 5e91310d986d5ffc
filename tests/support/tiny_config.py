"""The file of a tiny run with two growths, which tests of configurations start from."""

BASE = """
run_dir: runs/test
model: {vocab_size: 67, d_model: 36, n_layers: 3, n_heads: 4, head_dim: 6, d_ff: 62}
train: {seq_len: 16, micro_batch_size: 2, global_batch_size: 8, max_steps: 10}
optimizer: {lr: 1e-2}
growth:
  max_tokens: 2e3
  stages:
    - {d_model: 48, n_heads: 6, d_ff: 80, max_flops: 1.5e9}
    - {n_layers: 5}
data: {train: a, valid: b}
"""
