"""Weights in other forms: other layouts, Megatron-style shard files, Hugging Face directories; streamed."""
