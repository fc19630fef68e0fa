"""What a file is, by its first bytes: what stands in for a weight file is named as what it is."""

from pathlib import Path

from voco_jax.errors import InputError

ZIP_START = b"PK\x03\x04"
OLD_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""At the start of a file from before PyTorch 1.6, within its first pickle."""
_FETCH = "fetch the file itself: from its download link, signed in where that is asked for"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which stands for the file",
        "fetch the file with: git lfs pull",
    ),
    (
        b"/annex/objects/",
        "a git-annex pointer, which stands for the file",
        "fetch the file with: git annex get",
    ),
    (b"<!doctype html", "a web page (HTML)", _FETCH),
    (b"<html", "a web page (HTML)", _FETCH),
    (b"<?xml", "a server's answer (XML)", _FETCH),
    (b"<error", "a server's answer (XML)", _FETCH),
    (b"{", "JSON text (a list of parts, or a server's answer)", "fetch the weight file itself"),
    (bytes(512), "zeros, a download that did not end", "fetch it again"),
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip or tar -xzf"),
    (b"bzh", "a bzip2 archive", "unpack it with bunzip2 or tar -xjf"),
    (b"\xfd7zxz", "an xz archive", "unpack it with unxz or tar -xJf"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"\x89hdf", "an HDF5 file (Keras)", "save the PyTorch network's state_dict() with torch.save"),
    (b"\x93numpy", "a NumPy file", "save the tensors in a dict with torch.save"),
)
"""First bytes, letters in lower case; what it is; and the fix."""


def check_kind(path: Path, *, safetensors: bool) -> None:
    """Checks that a file is not something else than its suffix says.

    Args:
        path: of the file.
        safetensors: whether it should be that, or else the zip archive of torch.save.

    Raises:
        InputError: it is something else; the message says what, and the fix.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start[8:9] == b"{" if safetensors else start.startswith(ZIP_START):
        return
    found = _found(start, safetensors)
    if found is None:
        return  # the library says what is wrong with it
    what, fix = found
    expected = "a safetensors file" if safetensors else "the zip archive that torch.save writes"
    raise InputError(f"{path}: found {what}, expected {expected}; {fix}")


def _found(start: bytes, safetensors: bool) -> tuple[str, str] | None:
    """What a file is and the fix; None: nothing known, in place of a safetensors file."""
    if not start:
        return "an empty file", "its download or its writing failed: fetch it again"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower() or start
    for beginning, what, fix in _STARTS:
        if text.startswith(beginning):
            return what, fix
    if OLD_MAGIC in start[:24]:
        return "the format from before PyTorch 1.6", (
            "convert it: python -c \"import torch; torch.save(torch.load('FILE', "
            "map_location='cpu', weights_only=True), 'new.pt')\""
        )
    if safetensors:
        zipped = start.startswith(ZIP_START)
        return ("a zip archive, as torch.save writes", "rename it to .pt") if zipped else None
    if start[8:9] == b"{":
        return "a safetensors file", "rename it to .safetensors"
    return f"a file that starts with {start[:24]!r}", "fetch it again, or write it with torch.save"
