"""JAX's settings that change numbers, which the environment of any shell may hold."""

import os

import jax

from voco_jax.accelerators import cpu_where_nothing_else_is
from voco_jax.errors import InputError
from voco_jax.files import compilation_cache
from voco_jax.large_pages import restart_with_large_pages

# What this package is written and tested for. Another value gives other types or random draws, so
# that nothing that was begun without it can be repeated or resumed with it.
_EXPECTED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_disable_jit": False,
}
_ROUNDING = ("JAX_DEFAULT_MATMUL_PRECISION", "NVIDIA_TF32_OVERRIDE")


def check_jax_settings() -> str:
    """Looks for settings that change what is computed.

    Returns:
        One line that names those that change its rounding; "": there are none.

    Raises:
        InputError: one changes more than that.
    """
    wrong = []
    for name, expected in _EXPECTED.items():
        found = getattr(jax.config, name, expected)
        found = getattr(found, "value", found)  # of an enumeration
        if found != expected:
            wrong.append(f"{name.upper()}: found {found}, expected {expected}")
    if wrong:
        raise InputError(
            f"JAX's settings: {'; '.join(wrong)}: other numbers or random draws than this program "
            "is made for; unset these variables of the environment"
        )
    told = [f"{name}={os.environ[name]}" for name in _ROUNDING if os.environ.get(name)]
    return f"set in the environment, may change rounding: {', '.join(told)}" if told else ""


def prepare_process() -> None:
    """What a command that computes with JAX does first, as a process of its own.

    It starts again with large pages where that helps, computes on the CPU where no other device is,
    and keeps compiled programs for the next time.
    """
    restart_with_large_pages()
    cpu_where_nothing_else_is()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else JAX has read it
        jax.config.update("jax_compilation_cache_dir", compilation_cache())
