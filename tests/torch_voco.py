"""The published network and its training step in PyTorch, in float64."""

import monai_reference as reference
import numpy as np
import torch


class TorchVoCo(torch.nn.Module):
    """The published student or teacher: SwinUNETR's encoder, pooled, and the projector."""

    def __init__(self, config, patch_merging):
        super().__init__()
        self.net = reference.swin_unetr(
            feature_size=config["feature_size"],
            patch_merging=patch_merging,
            use_v2=True,
            window_size=4,
            depths=(1, 1, 1, 1),
        )
        for name in [n for n, _ in self.net.named_children() if n.startswith(("decoder", "out"))]:
            delattr(self.net, name)
        hidden = config["hidden"]

        def layer(inputs):
            norm = torch.nn.BatchNorm1d(hidden, affine=False, track_running_stats=False)
            return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), norm, torch.nn.ReLU())

        self.net.proj_head = torch.nn.Sequential()
        self.net.proj_head.layer1 = layer(24 * config["feature_size"])
        self.net.proj_head.layer2 = layer(hidden)
        self.net.proj_head.layer3 = torch.nn.Sequential(torch.nn.Linear(hidden, hidden))
        self.double()

    def forward(self, x):
        _, features = reference.encode(self.net, x)
        return self.net.proj_head(torch.cat([f.mean((2, 3, 4)) for f in features], dim=1))


def torch_steps(config, patch_merging, values, crops, labels):
    """Losses, first gradients and final parameters."""
    networks = {name: TorchVoCo(config, patch_merging) for name in ("student", "teacher")}
    for name, model in networks.items():
        state = {key: torch.from_numpy(value) for key, value in values[name].items()}
        assert not model.net.load_state_dict(state, strict=False).unexpected_keys
    student, teacher = networks["student"], networks["teacher"]
    count, labels = labels.shape[1], torch.from_numpy(labels[0]).double()
    x = reference.to_torch(crops).double()
    optimizer = torch.optim.AdamW(
        student.parameters(), config["lr"], weight_decay=0.01, amsgrad=True
    )
    history, gradients = [], {}
    for _ in range(config["steps"]):
        rows = torch.nn.functional.normalize(student(x))
        with torch.no_grad():
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.mul_(0.9).add_(s, alpha=0.1)
            rows_t = torch.nn.functional.normalize(teacher(x))
        p = rows[:count] @ rows_t[count:].T
        p = (p.relu() + (rows_t[:count] @ rows[count:].T).relu()) / 2
        pos = (-labels * torch.log(1 - (labels - p).abs() + 1e-6)).sum() / (labels.sum() + 1e-6)
        neg = (p[labels == 0] ** 2).mean()
        pairs = (rows[count:] @ rows[count:].T.detach()).relu() ** 2
        reg = pairs[np.triu_indices(len(pairs), 1)].mean()
        optimizer.zero_grad()
        (pos + neg + reg).backward()
        gradients = gradients or {k: v.copy() for k, v in reference.gradients(student.net).items()}
        optimizer.step()
        history.append([float(pos.detach()), float(neg.detach()), float(reg.detach())])
    final = {name: reference.parameters(model.net) for name, model in networks.items()}
    return np.array(history), gradients, final
