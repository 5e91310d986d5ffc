"""The canonical state on disk: full tensors under canonical names, in safetensors files with a JSON index."""
