"""What the layers compute between matrix products: the same functions in eager, compiled and Triton form."""
