"""The pre-training run, from a config to weights: one readable loop.

`step` is the number of completed updates, everywhere: step k used batch number k - 1.
"""

import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from voco_jax.config import Config, parse, to_dict
from voco_jax.data.cache import Cache, fingerprint
from voco_jax.data.datalists import collect
from voco_jax.data.phantom import make_phantoms
from voco_jax.data.pipeline import batches
from voco_jax.data.prepare import prepare
from voco_jax.errors import InputError
from voco_jax.evaluation.position import collapse_warning
from voco_jax.interop.export import Card, check_output, export
from voco_jax.interop.load import load_into
from voco_jax.models.swin_unetr import VoCoNetwork, check_crop_size
from voco_jax.training import mesh as meshes
from voco_jax.training.checkpoint import Checkpoints
from voco_jax.training.metrics import MetricsWriter, Progress, duration
from voco_jax.training.optimizer import make_optimizer, schedule
from voco_jax.training.validate import Validator, save_picture
from voco_jax.training.workdir import check_data, choose_volumes, claim_workdir
from voco_jax.voco import augment
from voco_jax.voco.step import State, init_state, make_predict, make_train_step


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number; the message names step and checkpoint."""


def run(config_dict: ml_collections.ConfigDict | Mapping[str, Any], workdir: str | Path) -> None:
    """Trains, or goes on training, until `total_steps`; then exports the teacher's encoder.

    Args:
        config_dict: as a config file returns it.
        workdir: everything is written there; the same call again resumes.

    Raises:
        InputError: anything the user has to mend.
        DivergedError: NaN or infinite loss.
    """
    start_time = time.monotonic()
    config = _fill_in(parse(config_dict), Path(workdir))
    mesh = meshes.make_mesh()
    network = make_network(config, mesh)
    meshes.check_batch_size(config.batch_size, mesh)
    if config.export_to:
        check_output(config.export_to)
    workdir = claim_workdir(Path(workdir), config)
    print(f"devices: {meshes.describe(mesh)}; workdir: {workdir}", flush=True)

    # ---- data
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    latest = checkpoints.latest_step()
    cache = open_cache(config, workdir)
    training, held_out = choose_volumes(cache, config, workdir, resuming=latest is not None)
    data_fingerprint = fingerprint(training)
    print(f"data: {len(training)} volumes to train on, {len(held_out)} held out", flush=True)

    # ---- state: restored, or new
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    make_state = partial(init_state, network, optimizer, config.crops.encoder_size, config.seed)
    replicated, by_volume = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    if latest is None:
        state = make_state(sharding=replicated)
        if config.init_from:
            state = jax.device_put(initialise_from(config, state), replicated)
        print("starting at step 0", flush=True)
    else:
        check_data(checkpoints.restore_info(latest), data_fingerprint, workdir)
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
            jax.eval_shape(make_state),
        )
        state = checkpoints.restore(latest, abstract)
        print(f"resuming at step {latest} of {config.total_steps}", flush=True)
    first_step = int(state.step)
    info: dict[str, Any] = {
        "config": to_dict(config),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "data_fingerprint": data_fingerprint,
    }

    # ---- compiled functions
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    # On a CPU, XLA merges recomputed activations with the first ones, and remat saves nothing.
    options = {"xla_disable_hlo_passes": "cse_barrier_expander"} if on_cpu else None
    step_function = jax.jit(
        make_train_step(
            network,
            optimizer,
            encoder_size=config.crops.encoder_size,
            momentum=config.teacher.momentum,
            draw=partial(
                augment.draw,
                flip_probability=config.augment.flip_probability,
                rotate_probability=config.augment.rotate_probability,
                shift_probability=config.augment.shift_probability,
                shift=config.augment.shift,
            ),
            seed=config.seed,
            passes=count_passes(config, mesh, config.crops.sub_volumes),
        ),
        in_shardings=(replicated, by_volume),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
        compiler_options=options,
    )
    predict = jax.jit(
        make_predict(
            network,
            encoder_size=config.crops.encoder_size,
            passes=count_passes(config, mesh, config.validation.sub_volumes),
        ),
        in_shardings=(replicated, by_volume),
        out_shardings=replicated,
    )
    validator = Validator(config, cache, held_out, predict, by_volume) if held_out else None

    # ---- the loop
    writer = MetricsWriter(workdir, first_step)
    learning_rate = schedule(config.optimizer, config.total_steps)
    progress = Progress(first_step, config.total_steps)
    pending = _Pending(checkpoints)
    paused = 0.0  # seconds of validation and of saving since the last lap
    try:
        if first_step < config.total_steps:
            print("compiling the step (minutes for a large model) ...", flush=True)
            stream = batches(
                cache,
                training,
                config.crops,
                seed=config.seed,
                batch_size=config.batch_size,
                start_step=first_step,
                workers=config.data.workers,
                prefetch=config.data.prefetch,
            )
            device_batches = _to_device(stream, by_volume)
        for step in range(first_step + 1, config.total_steps + 1):
            with jax.transfer_guard("disallow"):  # nothing moves unseen: only device_put and _get
                state, metrics = step_function(state, next(device_batches))
            pending.add(step, metrics)

            last = step == config.total_steps
            if step == first_step + 1 or step % config.log_every_steps == 0 or last:
                values = pending.fetch()
                rate, left = progress.lap(step, paused)
                paused = 0.0
                values["learning_rate"] = float(learning_rate(step - 1))
                if step == first_step + 1:  # its time is the compiler's
                    speed = f"compiled in {1 / rate:.0f} s"
                else:
                    values["volumes_per_second"] = rate * config.batch_size
                    speed = f"{values['volumes_per_second']:.2f} volumes/s  ETA {left}"
                writer.write(step, values)
                print(
                    f"step {step}/{config.total_steps}  loss {values['loss']:.4f} "
                    f"(pos {values['pos']:.4f} neg {values['neg']:.4f} reg {values['reg']:.4f})  "
                    f"lr {values['learning_rate']:.2e}  {speed}",
                    flush=True,
                )

            pause_start = time.monotonic()
            every = config.validation.every_steps
            if validator and every and (step % every == 0 or last):
                pending.fetch()
                _validate(validator, state, step, writer, workdir)
            # After validation: what is saved lacks nothing when the run is resumed.
            if step % config.checkpoint.every_steps == 0 or last:
                pending.fetch()  # never save what a NaN has reached
                checkpoints.save(state, info)
            paused += time.monotonic() - pause_start
        checkpoints.wait()
        if first_step == config.total_steps:
            print(f"nothing left to train: {workdir} is at step {first_step}", flush=True)
    except KeyboardInterrupt:
        checkpoints.wait()
        saved = checkpoints.latest_step()
        print(f"\ninterrupted; saved up to step {saved}: the same command resumes there")
        raise
    finally:
        writer.close()
        checkpoints.close()

    # ---- weights
    if config.export_to:
        card = Card(
            config=info["config"],
            step=int(state.step),
            network="teacher",
            data_fingerprint=data_fingerprint,
        )
        print(export(jax.device_get(state.teacher), config.export_to, card).text(), flush=True)
    print(f"done in {duration(time.monotonic() - start_time)}; everything is in {workdir}")


def make_network(config: Config, mesh: Mesh) -> nn.Module:
    """The student's and teacher's network, checked against the crops.

    Raises:
        InputError: settings that the encoder cannot take.
    """
    model = config.model
    convolution = model.convolution
    if convolution == "auto":
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        convolution = "planes" if on_cpu else "lax"
    try:
        check_crop_size(config.crops.encoder_size)
    except ValueError as error:
        raise InputError(f"crops.encoder_size: {error}") from error
    network = VoCoNetwork(
        feature_size=model.feature_size,
        depths=model.depths,
        num_heads=model.num_heads,
        window_size=model.window_size,
        patch_merging=model.patch_merging,
        use_v2=model.use_v2,
        drop_path_rate=model.drop_path_rate,
        projector_size=model.projector_size,
        remat=model.remat,
        dtype=jnp.dtype(model.dtype),
        convolution=convolution,
    )
    # Tracing the initialisation checks every other setting without computing anything.
    crops = jax.ShapeDtypeStruct((2, *config.crops.encoder_size, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: network.init(jax.random.key(0), x, False), crops)
    except InputError as error:
        raise InputError(f"model.{error}") from error
    return network


def count_passes(config: Config, mesh: Mesh, sub_volumes: int) -> int:
    """Into how many parts each device's crops are cut, by `model.crops_per_pass`."""
    volumes = config.batch_size // mesh.devices.size
    crops = volumes * (sub_volumes + math.prod(config.crops.grid))
    limit = config.model.crops_per_pass or crops
    return next(
        passes for passes in range(1, crops + 1) if crops % passes == 0 and crops // passes <= limit
    )


def open_cache(config: Config, workdir: Path) -> Cache:
    """Opens the cache; makes phantoms and fills it first where the config says so.

    Raises:
        InputError: no cache, another chain, nothing to prepare.
    """
    data = config.data
    lists, roots = data.lists, data.roots
    if data.phantoms:
        folder = workdir / "phantoms"
        print(f"making {data.phantoms} phantom CTs in {folder} ...", flush=True)
        lists, roots = (str(make_phantoms(folder, data.phantoms, config.seed)),), (str(folder),)
    if data.prepare:
        if not lists:
            raise InputError(
                "data.lists: found none with data.prepare=True, expected Decathlon lists "
                "(and their data.roots), or data.phantoms"
            )
        # Starting Dask takes longer than a few small phantoms do.
        workers = 0 if data.phantoms else None
        print(prepare(collect(lists, roots), data.cache, data.chain, workers), flush=True)
    return Cache.open(data.cache, data.chain)


def initialise_from(config: Config, state: State) -> State:
    """Replaces both networks' weights by those of `config.init_from`, and prints what matched.

    Raises:
        InputError: the file cannot be read or does not fit.
    """

    def load(params: Any) -> tuple[Any, Any]:
        return load_into(
            jax.device_get(params),
            config.init_from,
            config.init.allow_missing,
            config.init.allow_unexpected,
            window_size=config.model.window_size,
            patch_merging=config.model.patch_merging,
        )

    student, report = load(state.student)
    teacher, _ = load(state.teacher)
    print(report.text(), flush=True)
    return state.replace(student=student, teacher=teacher)  # type: ignore[attr-defined]


def _fill_in(config: Config, workdir: Path) -> Config:
    """Replaces "{workdir}" in paths."""
    values = to_dict(config)
    for section, name in ((values, "export_to"), (values["data"], "cache")):
        section[name] = section[name].replace("{workdir}", str(workdir))
    return parse(values)


def _to_device(stream: Iterator[Any], sharding: Any) -> Iterator[Any]:
    """Keeps one batch on its way to the device while the step before it runs."""
    ahead = jax.device_put(dict(next(stream)), sharding)
    while True:
        ready, ahead = ahead, jax.device_put(dict(next(stream)), sharding)
        yield ready


class _Pending:
    """Metrics that are still on the device: fetched seldom, but every step's is checked."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._steps: list[tuple[int, dict[str, jax.Array]]] = []
        self._last: dict[str, float] = {}

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._steps.append((step, metrics))

    def fetch(self) -> dict[str, float]:
        """The newest step's metrics.

        Raises:
            DivergedError: NaN or infinity in any step since the last call.
        """
        for step, metrics in jax.device_get(self._steps):
            self._last = {name: float(value) for name, value in metrics.items()}
            broken = [name for name, value in self._last.items() if not np.isfinite(value)]
            if broken:
                self._checkpoints.wait()
                saved = self._checkpoints.latest_step()
                good = f"{self._checkpoints.folder / str(saved)}" if saved is not None else "none"
                raise DivergedError(
                    f"step {step}: {', '.join(broken)} is not finite; training stopped. "
                    f"Last good checkpoint: {good}. Try a lower optimizer.learning_rate or "
                    "model.dtype=float32, in a new workdir"
                )
        self._steps.clear()
        return dict(self._last)


def _validate(
    validator: Validator, state: State, step: int, writer: MetricsWriter, workdir: Path
) -> None:
    found = validator(state, step)
    metrics = found.metrics
    writer.write(
        step,
        {
            "validation/position_accuracy": metrics.accuracy,
            "validation/chance": metrics.chance,
            "validation/overlap_error": metrics.overlap_error,
            "validation/similarity_spread": metrics.similarity_spread,
            "validation/embedding_spread": metrics.embedding_spread,
        },
    )
    writer.picture(step, "positions", found.image)
    picture = workdir / "pictures" / f"positions_{step:07d}.png"
    save_picture(found.image, picture)
    print(
        f"validation at step {step}: position accuracy {metrics.accuracy:.1%} "
        f"({metrics.accuracy / metrics.chance:.1f} times chance), mean absolute error of overlaps "
        f"{metrics.overlap_error:.4f}, picture {picture}",
        flush=True,
    )
    warning = collapse_warning(metrics)
    if warning:
        print(warning, flush=True)
