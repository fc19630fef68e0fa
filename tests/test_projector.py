import by_rule
import flax.linen as nn
import jax
import jax.numpy as jnp
import monai_reference as reference
import numpy as np
import pytest
import torch

from voco_jax.models.projector import Projector, batch_norm


class TorchProjector(torch.nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.layer1 = self._hidden(features, width)
        self.layer2 = self._hidden(width, width)
        self.layer3 = torch.nn.Sequential(torch.nn.Linear(width, width))

    @staticmethod
    def _hidden(features: int, width: int) -> torch.nn.Sequential:
        norm = torch.nn.BatchNorm1d(width, affine=False, track_running_stats=False)
        return torch.nn.Sequential(torch.nn.Linear(features, width), norm, torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer3(self.layer2(self.layer1(x)))


def test_projector_equals_torch():
    theirs = TorchProjector(20, 16)
    ours = Projector(20, 16, jnp.float32)
    x = by_rule.noise((9, 20))
    params = by_rule.load(by_rule.abstract(ours, x), reference.parameters(theirs))
    expected = theirs(torch.from_numpy(x))
    weights = by_rule.noise((9, 16), seed=1)
    (expected * torch.from_numpy(weights)).sum().backward()
    out, pull = jax.vjp(lambda params: ours.apply({"params": params}, x), params)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)
    expected_gradient = by_rule.load(params, reference.gradients(theirs))
    assert by_rule.relative_error(pull(jnp.asarray(weights))[0], expected_gradient) < 1e-5


def test_batch_norm_uses_the_batch_in_float32():
    x = jnp.asarray([[1.0, 300.0], [3.0, 302.0]], jnp.bfloat16)
    out = batch_norm(x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [[-1, -1], [1, 1]], atol=1e-4)


def test_bfloat16_products_keep_float32_parameters_and_output():
    ours = Projector(20, 16, jnp.bfloat16)
    x = by_rule.noise((9, 20))
    variables = nn.unbox(ours.init(jax.random.key(0), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    out = ours.apply(variables, x)
    assert out.dtype == jnp.float32
    assert by_rule.relative_error(out, Projector(20, 16, jnp.float32).apply(variables, x)) < 0.03


@pytest.mark.parametrize(("shape", "message"), [((1, 20), "at least 2"), ((4, 19), "20")])
def test_wrong_batches_are_errors(shape: tuple[int, int], message: str):
    with pytest.raises(ValueError, match=message):
        Projector(20, 16, jnp.float32).init(jax.random.key(0), jnp.zeros(shape))
