"""Weight files for tests."""

import json

import torch


def saved(folder, content, name="w.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def safetensors(folder, header, data=b"", *, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "w.safetensors"
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
