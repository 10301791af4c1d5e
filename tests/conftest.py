"""Settings that must stand before jax starts: eight virtual devices, and strict arithmetic."""

import os
import pathlib
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
# LLVM's optimisations would take longer than what they save of programs that run for a moment.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
# Fewer threads than virtual devices can hang in a collective's rendezvous.
os.environ["PJRT_NPROC"] = "32"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

# What several tests and the commands they start compile is compiled once, and not again in the next
# run; the user's own folder is left alone.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A shell's background jobs ignore it, and so would what tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
# What takes minutes, and says more of what a shorter test says too, runs where this is set.
THOROUGH = bool(os.environ.get("THOROUGH"))
thorough = pytest.mark.skipif(not THOROUGH, reason="THOROUGH=1 make test runs it: it takes long")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of real pictures and weights beside the checkout; absent for most users."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder ../shared with real pictures")
    return path


@pytest.fixture
def standard_promotion():
    """Types promoted as usual, for code that goes through optax, which counts on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield
