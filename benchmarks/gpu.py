"""Measures on one GPU what ViT-L/14's training steps come to, and what they are made of.

    python -m benchmarks.gpu --out=runs/gpu                                 # everything
    python -m benchmarks.gpu --only=ceilings,attention,layer --out=runs/gpu
    python -m benchmarks.gpu --variant=tiny --batch=4 --rounds=2 --out=runs/gpu   # to try the command

Every item is a process of its own, because XLA reads its flags once. Steps are compiled a few at once; then
one process after the other measures while the others wait. Rows go to DIR/gpu.jsonl as they come. A time is
the median over rounds, each of calls one behind another for 0.2 s. A step's other rows say what its
compilation is made of and which kernels it spends its time in. Errors stay rows: a GPU's time is dear. Most
of it goes into compilation, one to three minutes a step; with JAX_COMPILATION_CACHE_DIR set a second call
does not compile again.

MFU is the model's FLOPs (clipmoe_jax/models/flops.py) by the vendor's peak; "TFLOP/s" of a layer counts its
products alone, without padding and what is computed again.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmarks import profiles
from benchmarks.timing import Program

if TYPE_CHECKING:
    from benchmarks.ours import Training
    from benchmarks.workload import Workload

Row = dict[str, Any]
# Of the MoE layer: ViT-L/14's vision tower at batch 100.
TOKENS, WIDTH, HIDDEN, EXPERTS, SELECTED = 25_700, 1024, 4096, 4, 2
ROUND_SECONDS = 0.2

# (XLA's flags, fields of Workload, kind of step) by item.
STEPS = {
    "mcl": ("", {"remat": "dots"}, "mcl"),
    "router": ("", {"remat": "dots"}, "router"),
    "mcl_no_remat": ("", {"remat": "none"}, "mcl"),
    "mcl_unmerged": ("--xla_gpu_dot_merger_threshold_mb=0", {"remat": "none"}, "mcl"),
    "router_no_remat": ("", {"remat": "none"}, "router"),
    "router_no_graphs": ("--xla_gpu_enable_command_buffer=", {"remat": "none"}, "router"),
    "mcl_keep": ("", {"remat": "dots", "keep": True}, "mcl"),
    "mcl_keep_no_remat": ("", {"remat": "none", "keep": True}, "mcl"),
    "router_keep": ("", {"remat": "dots", "keep": True}, "router"),
    "router_keep_no_remat": ("", {"remat": "none", "keep": True}, "router"),
}
PARTS = ("ceilings", "equality", "attention", "products", "layer", "ahead")
# Settings of models/grouped_dot.py: WIDEST, LOADED, SNAKE.
SETTINGS = (*((256, 4, snake) for snake in (4, 8, 16, 1)), (256, 3, 4), (128, 4, 4), (128, 6, 4))
ITEMS = (*PARTS, *STEPS)


def seconds_of(call: Callable[[], Any], rounds: int) -> list[float]:
    """Returns the seconds of one call in each round."""
    import jax

    program = Program(call, jax.block_until_ready, flops=0.0)
    program.seconds()  # compiles
    repeats = max(1, int(ROUND_SECONDS / max(program.seconds(), 1e-6)))
    return [program.seconds(repeats) for _ in range(rounds)]


def timed(name: str, call: Callable[[], Any], rounds: int, flops: float = 0.0) -> Row:
    """Returns a row of a call's time; of its error, if it raises one."""
    try:
        seconds = seconds_of(call, rounds)
    except Exception as error:  # whatever a kernel's compiler raises: the other rows still count
        return {"name": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    row = {"name": name, "milliseconds": 1e3 * statistics.median(seconds), "seconds": seconds}
    return row | ({"tflops": flops / statistics.median(seconds) / 1e12} if flops else {})


def ceilings(rounds: int, size: int) -> Iterator[Row]:
    """Yields what the device does at best: a square product, and a copy in its memory."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    yield timed(f"product {size}", lambda: multiply(a, b), rounds, 2.0 * size**3)
    values = jax.random.normal(jax.random.key(2), (size * size * 16,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    row = timed("read and write", lambda: add(values), rounds)
    yield row | {"terabytes_per_second": 2 * values.nbytes / row["milliseconds"] / 1e9}


def equality(batch: int) -> Iterator[Row]:
    """Yields how far attention and a MoE layer, as they run here, are from float32, and how far XLA's
    attention and blocks of rows are, in the same half precision: the largest relative error of the output or
    a gradient. The bias of keys is left out: it changes no softmax, so that its gradient is 0."""
    import jax
    import jax.numpy as jnp

    from clipmoe_jax.core import trees
    from clipmoe_jax.models.feed_forward import quick_gelu
    from clipmoe_jax.models.moe import MoeMlp
    from clipmoe_jax.models.transformer import Attention

    def differences(exact: Any, ways: dict[str, Any], x: Any, *arguments: Any) -> Row:
        params = jax.jit(exact.init)(jax.random.key(0), x, *arguments)["params"]
        params = jax.tree.map(lambda leaf: leaf + 0.02, params)  # biases too

        def run(module, dtype):
            def apply(params, x):
                y = module.apply({"params": params}, x, *arguments)
                return (y[0] if isinstance(y, tuple) else y).astype(jnp.float32)

            def both(params, x, dy):
                y, pull_back = jax.vjp(apply, params, x)
                of_params, of_x = pull_back(dy)
                found = {f"d {name}": leaf for name, leaf in trees.flatten(of_params).items()}
                if "d in_proj/bias" in found:
                    found["d bias of queries"], _, found["d bias of values"] = jnp.split(
                        found.pop("d in_proj/bias"), 3
                    )
                return found | {"y": y, "dx": of_x}

            cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
            cast = {name: params[name] if name == "router" else cast[name] for name in cast}
            return jax.jit(both)(cast, x.astype(dtype), jax.random.normal(jax.random.key(1), x.shape))

        with jax.default_matmul_precision("highest"):
            wanted = run(exact, jnp.float32)
        told = {}
        for name, module in ways.items():
            found = run(module, jnp.bfloat16)
            errors = {
                leaf: float(jnp.linalg.norm(found[leaf] - value) / jnp.linalg.norm(value))
                for leaf, value in wanted.items()
            }
            told |= {name: max(errors.values()), f"{name} by array": errors}
        return told

    for name, (length, heads, causal) in {"vision": (257, 16, False), "text": (248, 12, True)}.items():
        x = jax.random.normal(jax.random.key(2), (batch, length, 64 * heads))
        for segments in (None, jnp.broadcast_to(jnp.arange(length) // 100, (batch, length))):
            ways = {way: Attention(heads, causal, way, jnp.bfloat16) for way in ("cudnn", "xla")}
            exact = Attention(heads, causal, "xla", jnp.float32)
            title = f"attention, {name}" + ("" if segments is None else ", packed")
            yield {"name": title} | differences(exact, ways, x, segments)
    x = jax.random.normal(jax.random.key(3), (batch, 257, WIDTH))
    layer = MoeMlp(EXPERTS, SELECTED, HIDDEN, quick_gelu, dtype=jnp.bfloat16)
    ways = {way: layer.copy(grouped_mlp=way) for way in ("tiles", "fixed_blocks")}
    yield {"name": "MoE layer"} | differences(layer.copy(dispatch="dense", dtype=jnp.float32), ways, x)


def attention(rounds: int, batch: int) -> Iterator[Row]:
    """Yields attention alone, forward and with its gradient."""
    import jax
    import jax.numpy as jnp

    from clipmoe_jax.models.attention import attention as attend

    shapes = {"vision": (257, 16, False), "vision, even length": (258, 16, False), "text": (248, 12, True)}
    for name, (length, heads, causal) in shapes.items():
        qkv = jax.random.normal(jax.random.key(0), (batch, length, 3, heads, 64), jnp.bfloat16)
        dy = jax.random.normal(jax.random.key(1), (batch, length, heads, 64), jnp.bfloat16)
        segments = jnp.broadcast_to(jnp.arange(length) // 100, (batch, length)).astype(jnp.int32)
        products = 4.0 * batch * heads * length**2 * 64
        for implementation in ("cudnn", "xla"):
            for of_segments in [None, segments] if causal else [None]:
                call = functools.partial(attend, causal=causal, implementation=implementation)
                forward = jax.jit(lambda qkv, call=call, of=of_segments: call(qkv, segments=of))
                gradient = jax.jit(lambda qkv, dy, f=forward: jax.vjp(f, qkv)[1](dy))
                title = f"{name}, {implementation}" + ("" if of_segments is None else ", packed")
                yield timed(f"{title}: forward", functools.partial(forward, qkv), rounds, products)
                both = functools.partial(gradient, qkv, dy)
                yield timed(f"{title}: forward and gradient", both, rounds, 3.5 * products)


def products(rounds: int, tokens: int) -> Iterator[Row]:
    """Yields the grouped products of a MoE layer by settings of their kernels, how far they are from float32
    sums, and a product of as many rows with one matrix."""
    import jax
    import jax.numpy as jnp

    from clipmoe_jax.models import grouped_dot

    num_tiles = -(-tokens * SELECTED // grouped_dot.ROWS)
    # Groups of different sizes, as routers make them.
    tile_expert = jnp.searchsorted(jnp.array([0.3, 0.55, 0.85]), jnp.linspace(0, 1, num_tiles)).astype(int)
    x, dy, kernels = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate(
            [
                (num_tiles * grouped_dot.ROWS, WIDTH),
                (num_tiles * grouped_dot.ROWS, HIDDEN),
                (EXPERTS, WIDTH, HIDDEN),
            ]
        )
    )
    flops = 2.0 * len(x) * WIDTH * HIDDEN
    multiply = jax.jit(jnp.matmul)
    yield timed("one product", lambda: multiply(x, kernels[0]), rounds, flops)
    for setting in SETTINGS:
        grouped_dot.WIDEST, grouped_dot.LOADED, grouped_dot.SNAKE = setting
        jax.clear_caches()
        calls = {
            "x W": (grouped_dot.grouped_dot, lambda x, w, of: x @ w[of], (x, kernels)),
            "y W^T": (
                lambda dy, kernels, of: grouped_dot._product(dy, kernels, of, transpose=True),
                lambda dy, w, of: dy @ w[of].T,
                (dy, kernels),
            ),
            "x^T y": (
                lambda x, dy, of: grouped_dot._kernel_gradient(x, dy, of, EXPERTS),
                None,
                (x, dy),
            ),
        }
        for name, (call, written_out, arguments) in calls.items():
            run = jax.jit(call)
            row = timed(f"{name}, {setting}", functools.partial(run, *arguments, tile_expert), rounds, flops)
            if "error" not in row:
                row["worst error"] = _worst_error(run, written_out, arguments, tile_expert)
            yield row


def _worst_error(
    run: Callable[..., Any], written_out: Callable[..., Any] | None, arguments: tuple, tile_expert: Any
) -> float:
    """Returns the largest difference from a product in float32, in standard deviations of the product."""
    import jax
    import jax.numpy as jnp

    found, wide = run(*arguments, tile_expert), [a.astype(jnp.float32) for a in arguments]
    differences, values = [], []
    with jax.default_matmul_precision("highest"):
        if written_out is None:
            rows = tile_expert.repeat(len(arguments[0]) // len(tile_expert))
            for expert in range(EXPERTS):
                x, dy = (jnp.where((rows == expert)[:, None], a, 0) for a in wide)
                values.append(x.T @ dy)
                differences.append(found[expert] - values[-1])
        else:
            for tile in (0, 1, len(tile_expert) // 2, len(tile_expert) - 1):
                rows = slice(tile * 128, (tile + 1) * 128)
                values.append(written_out(wide[0][rows], wide[1], int(tile_expert[tile])))
                differences.append(found[rows] - values[-1])
    return float(jnp.max(jnp.abs(jnp.stack(differences))) / jnp.std(jnp.stack(values)))


def layer(rounds: int, tokens: int) -> Iterator[Row]:
    """Yields one MoE layer with frozen experts by each way to run it, and one expert on as many slots."""
    import jax
    import jax.numpy as jnp

    from clipmoe_jax.models.feed_forward import Mlp, quick_gelu
    from clipmoe_jax.models.moe import MoeMlp

    x = jax.random.normal(jax.random.key(0), (1, tokens, WIDTH), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(1), x.shape, jnp.bfloat16)
    moe = MoeMlp(EXPERTS, SELECTED, HIDDEN, quick_gelu, dtype=jnp.bfloat16)
    params = jax.jit(moe.init)(jax.random.key(2), x)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params) | {"router": params["router"]}
    products = 4.0 * tokens * SELECTED * WIDTH * HIDDEN

    def rows_of(name: str, module: Any, params: Any) -> Iterator[Row]:
        def run(params, router, x):
            y = module.apply({"params": {**params, **router}}, x)
            return y[0] if isinstance(y, tuple) else y

        router = {"router": params["router"]} if "router" in params else {}
        forward = jax.jit(run)

        def pull_back(params, router, x, dy):
            return jax.vjp(functools.partial(run, params), router, x)[1](dy)

        gradient = jax.jit(pull_back)
        yield timed(f"{name}: forward", lambda: forward(params, router, x), rounds, products)
        both = functools.partial(gradient, params, router, x, dy)
        # Frozen experts: no product for their gradients.
        yield timed(f"{name}: forward and gradient", both, rounds, 2 * products)

    dense = Mlp(SELECTED * HIDDEN, quick_gelu, jnp.bfloat16)
    of_dense = jax.jit(dense.init)(jax.random.key(3), x)["params"]
    of_dense = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), of_dense)
    yield from rows_of("dense layer of as many FLOPs", dense, of_dense)
    for grouped_mlp in ("tiles", "fixed_blocks"):
        yield from rows_of(grouped_mlp, moe.copy(grouped_mlp=grouped_mlp), params)
    yield from rows_of("dense dispatch", moe.copy(dispatch="dense"), params)
    yield from rows_of("capacity of 1.0", moe.copy(dispatch="capacity", capacity_factor=1.0), params)


def make(item: str, args: argparse.Namespace) -> tuple["Workload", "Training", str]:
    """Returns a step before it is compiled: its sizes, its program, its kind."""
    from benchmarks.ours import Training
    from benchmarks.workload import Workload
    from clipmoe_jax.core import sharding

    _, fields, kind = STEPS[item]
    sizes = {"variant": args.variant, "batch": args.batch, "text": args.text, "dtype": "bfloat16"}
    workload = Workload(**sizes | fields, platform=sharding.platform())
    return workload, Training(workload, kind), kind


def ahead(args: argparse.Namespace) -> Iterator[Row]:
    """Yields MCL steps alone and while a thread compiles the router step, then that step: compare it with
    the item router_no_remat, which is compiled alone."""
    import jax

    (_, mcl, _), (_, router, _) = (make(item, args) for item in ("mcl_no_remat", "router_no_remat"))
    jax.config.update("jax_enable_compilation_cache", False)  # it is the compiler that is measured
    mcl.compile()
    yield timed("MCL step", mcl, args.rounds)
    began, seconds = time.perf_counter(), []
    with ThreadPoolExecutor(1) as thread:
        compilation = thread.submit(router.compile)
        while not (seconds and compilation.done()):
            before = time.perf_counter()
            jax.block_until_ready(mcl())
            seconds.append(time.perf_counter() - before)
        compilation.result()
    told = {"name": "MCL step beside a compilation", "milliseconds": 1e3 * statistics.median(seconds)}
    of_all = {"mean": 1e3 * statistics.mean(seconds), "worst": 1e3 * max(seconds)}
    yield told | of_all | {"seconds to compile": time.perf_counter() - began}
    yield timed("router step, compiled ahead", router, args.rounds)


def step(item: str, args: argparse.Namespace, wait: Callable[[], None]) -> Iterator[Row]:
    """Yields a step's time, MFU and memory, then the parts of its compilation, then its kernels."""
    import jax

    from clipmoe_jax.core.accelerators import of_kind

    workload, training, kind = make(item, args)
    with tempfile.TemporaryDirectory() as folder:
        with profiles.trace(folder, device=False):
            began = time.perf_counter()
            memory = training.compile()
            seconds = time.perf_counter() - began
        told = {"name": item, "seconds to compile": seconds, "peak GiB": memory / 2**30}
        wait()
        flops = workload.step_flops(kind)
        row = timed(item, training, args.rounds, flops)
        accelerator = of_kind(jax.devices()[0].device_kind)
        if accelerator and "tflops" in row:
            row["mfu"] = row["tflops"] * 1e12 / accelerator.peak_flops
        in_use = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        yield told | row | {"sizes": dataclasses.asdict(workload), "peak GiB in use": in_use / 2**30}
        yield {"name": f"compilation {item}", "parts": profiles.parts(folder)}
    with tempfile.TemporaryDirectory() as folder:
        with profiles.trace(folder):
            for _ in range(2):
                jax.block_until_ready(training())
        yield {"name": f"profile {item}", **profiles.kernels(folder, num_steps=2)}


def work(item: str, args: argparse.Namespace) -> None:
    """Prepares one item, waits for a line on standard input, measures, prints rows."""
    import jax

    def wait() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    if item in STEPS:
        rows = step(item, args, wait)
    else:
        jax.devices()
        wait()
        rows = {
            "ceilings": lambda: ceilings(args.rounds, 256 if args.variant == "tiny" else 8192),
            "equality": lambda: equality(args.batch // 10),
            "attention": lambda: attention(args.rounds, args.batch),
            "products": lambda: products(args.rounds, TOKENS * args.batch // 100),
            "layer": lambda: layer(args.rounds, TOKENS * args.batch // 100),
            "ahead": lambda: ahead(args),
        }[item]()
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for row in rows:
        print(json.dumps({"item": item} | row | device), flush=True)


def start(item: str) -> subprocess.Popen:
    """Starts the process of an item."""
    flags, *_ = STEPS.get(item, ("",))
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    }
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], f"--item={item}"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def show(row: Row) -> str:
    """Returns a line for a row."""
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    told = ", ".join(f"{key} {value:,.3f}" for key, value in numbers.items())
    return f"{row['item']:18} {row['name']:48} {row.get('error') or told}"


def main() -> None:
    """Measures, prints the rows, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default=",".join(ITEMS), help="items, with commas between")
    parser.add_argument("--variant", default="ViT-L/14")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--text", type=int, default=248)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at_once", type=int, default=3, help="processes that prepare at the same time")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.item:
        return work(args.item, args)
    items = args.only.split(",")
    if unknown := [item for item in items if item not in ITEMS]:
        raise SystemExit(f"--only: {unknown[0]!r} is not an item: choose among {', '.join(ITEMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "gpu.jsonl").open("a") as file:
        while items:
            processes = {item: start(item) for item in items[: args.at_once]}
            items = items[args.at_once :]
            for process in processes.values():
                assert process.stdout
                process.stdout.readline()  # "ready", or nothing where it has failed
            for item, process in processes.items():
                assert process.stdin and process.stdout
                if process.poll() is None:
                    process.stdin.write("go\n")
                    process.stdin.flush()
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    print(show(json.loads(line)), flush=True)
                if process.wait():
                    print(f"{item}: the process ended with code {process.returncode}", flush=True)


if __name__ == "__main__":
    main()
