"""benchmarks/: what train_step.py and sampling.py count, measure and say, on networks of one block.

Speed itself is not tested: machines differ, and drift.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import pytest

from benchmarks import profiling, timing
from configs import imagenet256
from pipelines import objectives
from pipelines.train import step_flops
from tests.conftest import thorough

ROOT = pathlib.Path(__file__).parents[1]
TINY = ("--model.depth=1", "--model.hidden_size=24", "--image_size=64")
COLUMNS = ["objective", "size", "batch", "guidance", "derivative", "dtype", "attention", "remat"]
COLUMNS += ["flops", "temp_bytes", "ms", "img_s", "share_of_peak", "compile_s"]


def command(script: str, *options: str) -> subprocess.CompletedProcess:
    """Runs a script on one device; LLVM's optimisations would take most of the time."""
    flags = "--xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@functools.cache
def results(script: str, *options: str) -> tuple[list[dict], list[list[str]], str]:
    """The JSON lines, the cells of the tables and all that was written to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "results.jsonl"
        trace = [word for word in options if word == "--profile"]
        rest = [word for word in options if word != "--profile"]
        extra = [f"--profile={folder}/trace"] if trace else []
        done = command(script, *TINY, f"--json={path}", *rest, *extra)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return rows, [line.strip("| ").split(" | ") for line in lines], done.stdout


def counted() -> tuple[list[dict], list[list[str]], str]:
    """A step, compiled and counted."""
    options = ("--objective=flow_matching", "--remat=full", "--count")
    return results("train_step", "--batch_size=8", *options)


def ran() -> tuple[list[dict], list[list[str]], str]:
    """Two steps that ran, with traces of them."""
    options = ("--derivative=apart", "--guidance=0.5", "--seconds=0.01", "--rounds=2")
    return results("train_step", "--batch_size=8", *options, "--profile")


@thorough
def test_what_runs_has_columns_counts_speed_and_a_trace():
    """One test, as processes that test at the same time would each run it."""
    columns_are_those_that_readers_of_the_files_count_on()
    counts_are_those_of_the_model_and_stand_in_order()
    counting_runs_nothing()
    speed_stands_beside_its_ratio_to_flow_matching()
    a_trace_says_where_the_time_goes()


def columns_are_those_that_readers_of_the_files_count_on():
    for rows, cells, _ in (counted(), ran()):
        assert cells[0][: len(COLUMNS)] == COLUMNS
        for row in rows:
            assert set(COLUMNS) < row.keys()
            assert {"jax", "jaxlib", "device", "commit"} < row.keys()
        assert len({len(line) for line in cells[: 2 + len(rows)]}) == 1


def counts_are_those_of_the_model_and_stand_in_order():
    rows, _, _ = ran()
    config = imagenet256.get_config("meanflow_b4")
    config.batch_size = 8
    config.model.update({"size": "S/4", "depth": 1, "hidden_size": 24})
    config.mean_flow.update({"omega": 1.0, "kappa": 0.5})
    flow = step_flops(config, (8, 8, 4), 1000, objectives.flow_objective(config, 1000, local=8))
    apart = objectives.mean_flow_objective(config, 1000, local=8)
    wanted = [flow, step_flops(config, (8, 8, 4), 1000, apart)]
    assert [row["flops"] for row in rows] == wanted
    assert [row["flops_of_flow"] for row in rows] == [flops / flow for flops in wanted]
    assert wanted == sorted(wanted)
    assert [row["derivative"] for row in rows] == ["", "apart"]
    (again,) = counted()[0]  # remat computes more, the model does not
    assert again["flops"] == flow


def counting_runs_nothing():
    (row,), _, written = counted()
    assert row["temp_bytes"] > 0
    assert row["compile_s"] > 0
    assert {row[name] for name in ("ms", "img_s", "share_of_peak", "of_flow")} == {None}
    assert "matrix rate" not in written


def speed_stands_beside_its_ratio_to_flow_matching():
    rows, _, written = ran()
    assert "matrix rate in float32: " in written
    for row in rows:
        assert row["img_s"] == pytest.approx(8000 / row["ms"])
        rate = row["flops"] / (row["ms"] / 1000) / row["matrix_rate"]
        assert row["share_of_peak"] == pytest.approx(rate)
        assert len(row["ms_by_round"]) == 2
    flow, mean = rows
    assert flow["of_flow"] == 1
    pairs = zip(flow["ms_by_round"], mean["ms_by_round"], strict=True)
    assert mean["of_flow"] == pytest.approx(sum(a / b for a, b in pairs) / 2)


def a_trace_says_where_the_time_goes():
    rows, cells, _ = ran()
    (at,) = [i for i, line in enumerate(cells) if line[0] == "ms of device time per step"]
    assert cells[at][1:] == [*profiling.KINDS, "other"]
    for row in rows:
        kinds = row["ms_by_kind"]
        assert kinds["matmul"] > 0
        assert kinds["elementwise"] > 0
        assert kinds["attention"] == 0  # XLA's has no kernel of its own
        assert kinds["other"] < 0.1 * sum(kinds.values())


def test_sampling_counts_network_calls_and_what_guidance_costs():
    options = ("--batch_size=4", "--steps=2", "--seconds=0.01", "--rounds=2")
    rows, cells, _ = results("sampling", *options)
    plain, guided = rows
    assert (plain["nfe"], guided["nfe"]) == (2, 4)
    assert guided["flops"] == 2 * plain["flops"]
    assert plain["of_unguided"] == 1
    assert guided["of_unguided"] > 0
    assert plain["sampler_share"] == 1
    assert plain["img_s"] == pytest.approx(4000 / plain["ms"])
    assert len(cells) == 4


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        ("train_step", "--size=B/3", "error: model.size='B/3': one of S/1"),
        ("sampling", "--features", "error: --features needs pictures: give --decode=float32"),
    ],
)
def test_mistakes_are_told_in_one_line(script, option, message):
    done = command(script, option, "--count")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(message)
    assert "Traceback" not in done.stderr


# Turns and traces, without a compiler.


def full() -> None:
    """Fails as a device does whose memory is full."""
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes")


def test_what_does_not_fit_is_a_note_and_the_others_take_their_turns():
    order = []
    cases = {"a": lambda: order.append("a"), "full": full, "b": lambda: order.append("b")}
    times, failed = timing.interleaved(cases, 3, 0.0, reset=lambda: order.append("anew"))
    assert failed == {"full": "out of memory"}
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 3, "b": 3}
    assert order == ["a", "a", "anew", "b", "b", *["a", "b"] * 3]


def test_other_errors_are_no_lack_of_memory():
    def broken() -> None:
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        timing.interleaved({"broken": broken}, rounds=1, seconds=0.0)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("loop_fusion.3", "elementwise"),
        ("input_reduce_fusion", "elementwise"),
        ("wrapped_convert", "elementwise"),
        ("gemm_fusion_dot_5", "matmul"),
        ("custom-call.2 nvjet_sm90_tst_128x256", "matmul"),
        ("cublas-gemm.1.0", "matmul"),
        ("fusion.7 convolution fusion", "matmul"),
        ("custom-call.9 cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("splash_mha_fwd custom-call", "attention"),
        ("memcpyd2d", "copies"),
        ("all-reduce-start.1 nccldevkernel_allreduce_sum_f32_ring_ll", "collectives"),
        ("infeed", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(words, kind):
    assert profiling.kind(words) == kind


def test_of_events_within_others_the_inner_ones_count():
    outer = profiling.Event(0, 10, "call", "")
    inner = [profiling.Event(1, 3, "dot", ""), profiling.Event(5, 2, "copy", "")]
    after = profiling.Event(10, 4, "fusion", "")
    own = {event.name: ns for event, ns in profiling.alone([after, *inner, outer])}
    assert own == {"call": 5, "dot": 3, "copy": 2, "fusion": 4}


def test_fusions_with_products_inside_are_found_in_the_compiled_program():
    text = """
%fused_computation (p: f32[2,2]) -> f32[2,2] {
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}

fused_computation.1 (p: f32[2,2]) -> f32[2,2] {
  ROOT %add.1 = f32[2,2]{1,0} add(%p, %p)
}

ENTRY %main (x: f32[2,2]) -> f32[2,2] {
  %fusion.8 = f32[2,2]{1,0} fusion(%x), kind=kOutput, calls=%fused_computation
  ROOT fusion.9 = f32[2,2]{1,0} fusion(%fusion.8), kind=kLoop, calls=fused_computation.1
}
"""
    assert profiling.products(text) == {"fusion.8"}
