"""AdamW with AMSGrad and the schedule, against torch.optim and closed forms."""

import math

import jax
import numpy as np
import optax
import pytest
import torch

from configs import voco_10k
from voco_jax.config.common import Optimizer
from voco_jax.config.load import parse
from voco_jax.training.optimizer import make_optimizer, schedule


def _settings(**changes):
    values = {"learning_rate": 0.1, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999}
    return Optimizer(**{**values, "eps": 1e-8, "warmup_steps": 0, **changes})


@pytest.mark.parametrize("beta2", [0.999, 0.5])
def test_twenty_steps_are_torchs(generator, beta2):
    start = generator.normal(size=(5, 3)).astype(np.float32)
    gradients = generator.normal(size=(20, 5, 3)).astype(np.float32)
    gradients *= generator.uniform(0.01, 3, size=(20, 1, 1)).astype(np.float32)

    settings = _settings(beta2=beta2, warmup_steps=5)
    optimizer, rates = make_optimizer(settings, 20), schedule(settings, 20)
    params, state = start, optimizer.init(start)
    tensor = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW(
        [tensor], lr=1.0, betas=(0.9, beta2), eps=1e-8, weight_decay=0.01, amsgrad=True
    )
    update = jax.jit(optimizer.update)
    for step, gradient in enumerate(gradients):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        reference.param_groups[0]["lr"] = float(rates(step))
        tensor.grad = torch.tensor(gradient)
        reference.step()
    np.testing.assert_allclose(params, tensor.detach().numpy(), rtol=2e-6, atol=2e-6)


def test_published_schedule():
    settings = parse(voco_10k.get_config()).optimizer
    rates = schedule(settings, 250_000)

    def published(step):
        if step < 5_000:
            return 1e-4 * step / 5_000
        progress = (step - 5_000) / (250_000 - 5_000)
        return 1e-4 * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

    for step in (0, 1, 2_500, 4_999, 5_000, 5_001, 100_000, 127_500, 249_999, 250_000):
        assert float(rates(step)) == pytest.approx(published(step), rel=1e-4, abs=1e-11)
