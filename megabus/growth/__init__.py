"""BUS: fractional, function-preserving growth of width and depth, of whole tensors and of shards in place."""
