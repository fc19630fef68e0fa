"""A second task for the loop: one linear layer tells the mean of a phantom's crop."""

import dataclasses
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from voco_jax.data.phantom import phantom
from voco_jax.training.compile import build_program
from voco_jax.training.task import Task, Validation


@flax.struct.dataclass
class State:
    step: jax.Array
    weights: dict


def make_program(toy, mesh):
    def init(shardings):
        weights = {"w": jax.random.normal(jax.random.key(toy.seed), (64,))}
        return jax.device_put(State(jnp.int32(0), weights), shardings)

    def predict(state, batch):
        return jnp.mean((batch["crops"] @ state.weights["w"] - batch["crops"].mean(1)) ** 2)

    def step(state, batch):
        loss, slope = jax.value_and_grad(predict, allow_int=True)(state, batch)
        weights = {"w": state.weights["w"] - 0.02 * slope.weights["w"]}
        return State(state.step + 1, weights), {"loss": loss}

    batch = {"crops": jax.ShapeDtypeStruct((toy.run.batch_size, 64), jnp.float32)}
    state = jax.eval_shape(init, None)
    return build_program(mesh, state=state, batch=batch, init=init, step=step, predict=predict)


def make_task(toy, program, *, workdir, resumes, log):
    scan = np.asarray(phantom(0, 0, (32, 32, 16))[0].dataobj, np.float32) / 1000

    def crops(step):
        corners = np.random.default_rng(step).integers(0, 12, (toy.run.batch_size, 3))
        return {"crops": np.stack([scan[x:, y:, z:][:4, :4, :4].ravel() for x, y, z in corners])}

    def validate(state, step):
        error = float(program.predict(state, crops(10**6)))
        return Validation(metrics={"error": error}, score=-error, text=f"error {error:.4f}")

    return Task(
        program=program,
        batches=lambda step: map(crops, itertools.count(step)),
        validate=validate,
        finish=lambda state: f"wrote {np.save(workdir / 'w.npy', state.weights['w']) or 'w.npy'}",
        data_fingerprint="phantom 0",
        experiment=dataclasses.asdict(toy),
        networks=("weights",),
    )
