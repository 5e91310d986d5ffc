"""The types that tensors may be written in; known without torch."""

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's names, and safetensors' for the same
