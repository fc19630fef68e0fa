"""The rules of ../shared/golden/README.md: weights and crops of the golden training steps."""

import re
import zlib

import jax
import numpy as np


def torch_name(path):
    """Tree path -> PyTorch name; the tests' own copy of the rule in models/swin_unetr.py."""
    *modules, leaf = [str(entry.key) for entry in path]
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def rule(key, shape, prefix=""):
    name = prefix + key
    n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    n = n.astype(np.float32)
    if key.endswith("relative_position_bias_table"):
        return 0.5 * n
    if key.endswith(".bias"):
        return 0.05 * n
    if len(shape) == 1:
        return 1 + 0.1 * n
    return n / np.sqrt(np.prod(shape[1:]))


def weights(params):
    """(student, teacher) trees by the rule, shaped like `params`."""

    def leaf(path, value, teacher):
        key = torch_name(path)
        kernel = path[-1].key == "kernel"
        order = (value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
        shape = tuple(np.array(value.shape)[list(order)]) if kernel else value.shape
        found = rule(key, shape)
        if teacher:
            found = found + 0.1 * rule(key, shape, "teacher.")
        return np.transpose(found, np.argsort(order)) if kernel else found

    return tuple(
        jax.tree_util.tree_map_with_path(lambda p, v, t=t: leaf(p, v, t), params)
        for t in (False, True)
    )


def crops(seed, count, size):
    r = np.random.default_rng(seed)
    axes = [np.linspace(0, 1, s, dtype=np.float32) for s in size]
    g = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    out = []
    for _ in range(count):
        f = r.uniform(-4, 4, (3, 3)).astype(np.float32)
        p = r.uniform(0, 2 * np.pi, 3).astype(np.float32)
        out.append(0.5 + np.mean(np.sin(g @ f.T * np.pi + p), axis=-1) / 2)
    return np.stack(out).astype(np.float32)
