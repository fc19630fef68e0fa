"""PyTorch names and files: export, import, and reports of what matched.

Only this folder imports torch, lazily and only for PyTorch's own files. Nothing here needs JAX
except `load` and `export`, which take the model's parameters.
"""
