"""The three recipes' losses in PyTorch, written from the published equations, volume by volume.

Written apart from `voco_jax.voco.losses` on purpose: loops instead of broadcasting, PyTorch's own
cosine, and gradients that are stopped by `detach`.
"""

from collections.abc import Mapping

import torch

Terms = dict[str, torch.Tensor]
Rows = Mapping[str, torch.Tensor]


def cosines(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(m, d), (n, d) -> (m, n)."""
    return torch.stack([torch.nn.functional.cosine_similarity(row[None], others) for row in rows])


def _weighted(y: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return (-y * torch.log(1 - (y - p).abs() + 1e-6)).sum() / (y.sum() + 1e-6)


def _mean(values: torch.Tensor) -> torch.Tensor:
    """0 of no values: a volume may have no base crop without overlap."""
    return values.mean() if values.numel() else values.sum()


def _pairs(bases: torch.Tensor, *, one_sided: bool) -> torch.Tensor:
    found = []
    for i in range(len(bases) - 1):
        rest = bases[i + 1 :].detach() if one_sided else bases[i + 1 :]
        found.append(cosines(bases[i : i + 1], rest)[0].relu() ** 2)
    return torch.cat(found).mean()


def _paper(e: Rows, y: torch.Tensor, v: int) -> Terms:
    p = cosines(e["x_student"][v], e["bases_student"][v].detach()).relu()
    return {
        "pos": _mean(-torch.log(1 - (y[v] - p).abs() + 1e-6)[y[v] > 0]),
        "neg": _mean(p[y[v] == 0] ** 2),
        "reg": _pairs(e["bases_student"][v], one_sided=False),
    }


def _voco_10k(e: Rows, y: torch.Tensor, v: int) -> Terms:
    ours = cosines(e["x_student"][v], e["bases_teacher"][v].detach()).relu()
    theirs = cosines(e["x_teacher"][v].detach(), e["bases_student"][v]).relu()
    p = (ours + theirs) / 2
    return {
        "pos": _weighted(y[v], p),
        "neg": _mean(p[y[v] == 0] ** 2),
        "reg": _pairs(e["bases_student"][v], one_sided=True),
    }


def _voco_v2(e: Rows, y: torch.Tensor, v: int) -> Terms:
    following = (v + 1) % len(y)
    p = cosines(e["x_student"][v], e["bases_teacher"][v].detach()).relu()
    p_next = cosines(e["x_student"][v], e["bases_student"][following]).relu()
    y_next = cosines(e["x_teacher"][v], e["bases_teacher"][following]).relu().detach()
    return {
        "pos": _weighted(y[v], p),
        "neg": _mean(-torch.log(1 - p + 1e-6)[y[v] == 0]),
        "reg": _pairs(e["bases_student"][v], one_sided=True),
        "inter": _weighted(y_next, p_next) + _mean(-torch.log(1 - p_next + 1e-6)[y_next == 0]),
    }


_RECIPES = {"paper": _paper, "voco_10k": _voco_10k, "voco_v2": _voco_v2}


def terms(recipe: str, embeddings: Rows, labels: torch.Tensor) -> Terms:
    """pos, neg, reg and inter (0 where there is none), means over the volumes.

    Args:
        recipe: paper, voco_10k or voco_v2.
        embeddings: x_student, x_teacher (b, s, d), bases_student, bases_teacher (b, n, d).
        labels: (b, s, n).
    """
    volumes = [_RECIPES[recipe](embeddings, labels, v) for v in range(len(labels))]
    zero = torch.zeros((), dtype=labels.dtype)
    return {
        name: sum((volume.get(name, zero) for volume in volumes), zero) / len(volumes)
        for name in ("pos", "neg", "reg", "inter")
    }
