"""Compiles the Triton kernels for GPUs that need not be there; prints one JSON line per kernel, tile and target.

    python tests/compile_kernels.py [--all]

It runs in a process of its own, without Triton's interpreter. ``--all``: every tile of kernels/configs.py, not only the
default. Registers and spills are those of the machine code that Triton would load.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from logitless.kernels import (  # noqa: E402
    close,
    configs,
    divergences,
    generic,
    gradient,
    product,
    sinkhorn,
    sinkhorn_iteration,
    sinkhorn_run,
    statistics,
    tokens,
)
from logitless.losses import policy  # noqa: E402
from logitless.ops.tokens import triton as token_launches  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": None}
VOCABULARY = 128256
FLOATS = {"outer", "numbers", "weights", "row_gradient"}
FLOATS |= {"student_bias", "teacher_bias", "student_floor", "teacher_floor"}
FLOATS |= {"cost", "c", "s", "x", "y", "logits", "upstream", "residual", "history"}  # of kernels/sinkhorn.py
LOGITS = {"student", "teacher", "out"}
HIDDEN = {"hidden", "weight", "teacher_hidden", "teacher_weight"}
DOUBLES = {"accumulators", "sums", "slopes"}
LONGS = {"targets", "argmax"}
TOKENS = {"inputs": ("*fp32",), "numbers": ("fp32",), "mask": "i1", "offsets": "i64", "denominator": "fp32"}
TOKENS |= {"slopes": "fp32", "share": "i8", "spread": "fp64", "partials": "fp64", "counter": "i32", "results": "fp64"}
TOKENS |= {"norm": "fp64", "upstream": "fp32"}
RUN = dict.fromkeys(
    "a b start annealed f_out g_out rows_out history_f history_g of_f of_g of_cost of_a of_b".split(), "fp32"
)
RUN |= {"reached_out": "i1", "iterations": "i64", "stopped": "i1", "returned": "i32"}
ITERATION = dict.fromkeys("log_a weighted sums exponents t".split(), "fp32")
FLAGS = (
    "STUDENT_BIAS STUDENT_CAPPED STUDENT_FILTERED PAIR TEACHER_BIAS TEACHER_CAPPED TEACHER_FILTERED TARGETS ENTROPY "
    "COLLISION WEIGHTED WEIGHTS ARGMAX MOMENTS ONE_HOT Q P Q_LOG_Q Q_SQUARED Q_LOG_RATIO WEIGHT_VECTOR ROW_GRADIENT "
    "LIVE"
).split()


def variants(everything: bool):
    """(name, kernel, tile, constants, element types) of what is shipped."""

    def tiles(name: str):
        candidates = configs.CANDIDATES[name] if everything else configs.CANDIDATES[name][:1]
        return [configs.row_tile(VOCABULARY, *candidate) for candidate in candidates]

    whole = {"parts": 1, "slope_parts": 1}  # Triton makes constants of arguments that are 1: so are most launches
    plain = {"TARGETS": 1} | whole
    pair = {"PAIR": 1, "TARGETS": 1, "MOMENTS": 1}
    full = {"ENTROPY": 1, "COLLISION": 1, "WEIGHTED": 1, "WEIGHTS": 1, "ARGMAX": 1, "STUDENT_CAPPED": 1}
    basis = {"PAIR": 1, "P": 1, "WEIGHTS": 1, "Q_LOG_Q": 1, "Q_SQUARED": 1, "Q_LOG_RATIO": 1, "WEIGHT_VECTOR": 1}
    filtered = {"STUDENT_FILTERED": 1}
    cross_entropy = {"ONE_HOT": 1, "Q": 1, "LIVE": 1, "DIVERGENCES": (), "PLACES": ()}
    for tile in tiles("statistics"):
        yield "statistics", statistics.statistics, tile, plain, {}
        yield "statistics, filtered", statistics.statistics, tile, plain | filtered, {}
        yield "statistics, all", statistics.statistics, tile, {"TARGETS": 1} | full | filtered, {}
    for tile in tiles("pair_statistics"):
        yield "pair statistics", statistics.statistics, tile, pair, {}
        yield "pair statistics, all", statistics.statistics, tile, pair | full | filtered, {}
    for tile in tiles("generic"):
        for name, number in divergences.NUMBERS.items():
            given = {"DIVERGENCE": number, "PLACE": 6} | whole
            yield f"generic {name}", generic.generic, tile, given, {}
            yield f"generic {name}, filtered", generic.generic, tile, given | filtered, {}
    for tile in tiles("gradient"):
        yield "gradient of cross_entropy", gradient.gradient, tile, cross_entropy, {}
        yield "gradient of cross_entropy, bf16", gradient.gradient, tile, cross_entropy, {"out": "bf16"}
        yield "gradient of filtered cross_entropy", gradient.gradient, tile, cross_entropy | filtered, {"out": "bf16"}
        every = cross_entropy | basis | filtered | {"STUDENT_CAPPED": 1, "ROW_GRADIENT": 1}
        every |= {"DIVERGENCES": (0, 0, 1, 2, 3, 4, 5, 6), "PLACES": (0, 2, 4, 6, 9, 10, 11, 14)}
        yield "gradient, all", gradient.gradient, tile, every, {"out": "bf16"}
    closing = {"PAIR": 1, "TARGETS": 1, "MOMENTS": 1, "WEIGHTED": 1, "ENTROPY": 1, "COLLISION": 1, "ONE_HOT": 1, "P": 1}
    closing |= {"Q_LOG_Q": 1, "Q_SQUARED": 1, "Q_LOG_RATIO": 1, "SLOPES": (0, 2)}
    yield "close", close.close, configs.Config(128, 1, 4), closing, {}
    wide = {"PRECISION": "ieee", "ENTROPY": 1, "ARGMAX": 1}
    for low, name in ((True, "bf16"), (False, "fp32")):
        types = dict.fromkeys(HIDDEN, name)
        tile = configs.product_tile(low, False, interpreted=False)
        yield f"product {name}", product.product_statistics, tile, plain | wide, types
        tile = configs.product_tile(low, True, interpreted=False)
        yield f"pair product {name}", product.product_statistics, tile, pair | wide, types
    for adjacent, stride in ((False, "column_stride"), (True, "row_stride")):
        tile = configs.cost_tile(1 << 10, adjacent, interpreted=False)
        yield f"softmin, {stride} 1", sinkhorn.softmin, tile, {stride: 1}, {}
    for m in (8, 200, 4096, 16384):
        yield f"sinkhorn iteration, rows of {m}", sinkhorn_iteration.rows, configs.iteration_tile(m), {}, ITERATION
    yield "sinkhorn iteration, columns", sinkhorn_iteration.columns, configs.columns_tile(False), {}, ITERATION
    for kind, products in (("sqeuclidean", True), ("euclidean", False)):
        tile, given = configs.points_tile(products, interpreted=False), {"COST": sinkhorn.COSTS[kind]}
        yield f"softmin of {kind}", sinkhorn.softmin_of_points, tile, given, {}
    for n, m in ((16, 16), (64, 64)):
        tile = configs.run_tile(n, m)
        given = {"ROWS": tile.rows, "COLUMNS": tile.block, "KEEP": 1, "JUDGED": 1, "WANTED": 1, "column_stride": 1}
        yield f"sinkhorn run, {n} x {m}", sinkhorn_run.run, tile, given, RUN
        yield f"sinkhorn run, backward, {n} x {m}", sinkhorn_run.run_backward, tile, given, RUN
    for n, dialect in ((4, "exact"), (4, "deepseek"), (4, "megatron"), (33, "exact"), (64, "deepseek")):
        tile = configs.matrices_tile(n)
        given = {"DIALECT": sinkhorn.DIALECTS[dialect], "TILE": tile.rows, "N": n, "PADDED": tile.block}
        yield f"doubly_stochastic {dialect}", sinkhorn.doubly_stochastic, tile, given, {}
        yield f"doubly_stochastic_backward {dialect}", sinkhorn.doubly_stochastic_backward, tile, given, {}


OBJECTIVES = {  # and whether the tokens are one row, without sequences
    "ppo": (policy.ppo(beta=0.1), True),
    "grpo": (policy.grpo(beta=0.1), False),
    "gspo": (policy.gspo(), False),
    "cispo": (policy.cispo(), True),
    "vespo": (policy.vespo(rollout=True), False),
    "dppo_kl and much else": (
        policy.dppo_kl(
            beta=0.1,
            kl_clamp=(20.0, 10.0),
            entropy_coef=0.1,
            ratio=policy.Ratio("sequence-mean", 0.5, high=10.0),
            penalties=(policy.KL(0.1, "ratio_k3"), policy.KL(0.1, "dph_alpha")),
            rewards=(policy.LogRatioReward(0.5),),
            correction=(policy.mis(against="logprob"), policy.Opsm(0.1)),
        ),
        False,
    ),
}


def token_variants():
    """As ``variants``: the kernels of some policy objectives."""
    for name, (objective, flat) in OBJECTIVES.items():
        given = dict.fromkeys(objective.reads, torch.ones(2) if flat else torch.ones(1, 2))
        prepared = objective.prepare(given, like=given["logprob"])
        recipe, inputs, _ = objective.recipe(prepared, None)
        described = token_launches.described(recipe)
        tile = configs.token_parts(1 << 20, None if flat else 1000, 132, interpreted=False)
        types = TOKENS | {"inputs": ("*fp32",) * len(inputs), "numbers": ("fp32",) * len(described.numbers)}
        shared = described.shared | {"PER_SEQUENCE": (False,) * len(inputs), "MASK": True}
        spread = recipe.ratio.level in token_launches.SPREADING
        own = {"OFFSETS": not flat, "LIMITED": False, "GRADIENTS": recipe.gradients, "SPREAD": spread}
        yield f"tokens: {name}", tokens.evaluate, tile, shared | described.own | own, types
        if not flat:
            yield f"tokens: sums of {name}", tokens.sequence_sums, tile, shared, types
        yield f"tokens: gradient of {name}", tokens.gradient, tile, {"COUNT": 1, "SPREAD": spread}, types


def compile_for(target: GPUTarget, kernel, tile, constants: dict, types: dict) -> dict[str, int]:
    """Registers, spills in bytes, shared memory in bytes."""
    sizes = {"ROWS": getattr(tile, "rows", 0), "BLOCK": tile.block, "DEPTH": getattr(tile, "depth", 0)}
    sizes["STAGES"] = configs.iteration_stages(target.backend == "hip")
    given = dict.fromkeys(FLAGS, 0) | sizes | constants
    signature, constexprs, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.isupper() or name in constants:
            signature[name], constexprs[place,] = "constexpr", given[name]
            continue
        if isinstance(types.get(name), tuple):
            signature[name] = types[name]
            if types[name][0].startswith("*"):
                aligned |= {(place, k): [["tt.divisibility", 16]] for k in range(len(types[name]))}
        elif name in types.keys() | FLOATS | LOGITS | HIDDEN | DOUBLES | LONGS or name == "live":
            element = "fp32" if name in FLOATS | LOGITS | HIDDEN else "fp64" if name in DOUBLES else "i64"
            signature[name] = "*" + types.get(name, "i1" if name == "live" else element)
            aligned[place,] = [["tt.divisibility", 16]]
        elif name.endswith("inner") or name in ("epsilon", "tolerance", "rho_a", "rho_b", "damping"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.endswith(("stride", "columns", "width", "tokens")):
                aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": tile.warps, "enable_fp_fusion": False}
    if hasattr(tile, "stages"):
        options["num_stages"] = tile.stages
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        return {
            "registers": counts["vgpr_count"],
            "spills": 4 * counts["vgpr_spill_count"],
            "shared": compiled.metadata.shared,
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout).groups()
    return {"registers": int(registers), "spills": int(stack), "shared": compiled.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    everything = parser.parse_args().all
    for name, kernel, tile, constants, types in (*variants(everything), *token_variants()):
        for target, gpu in TARGETS.items():
            if kernel is sinkhorn_iteration.rows and tile.block > configs.longest_row(SHARED[target]):
                continue
            found = compile_for(gpu, kernel, tile, constants, types)
            print(json.dumps({"kernel": name, "tile": repr(tile), "target": target} | found), flush=True)


if __name__ == "__main__":
    main()
