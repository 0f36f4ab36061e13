"""Tokens per second and model FLOPs utilisation (MFU) of the actor's update on one GPU.

    python benchmarks/gpu.py [--size 1.7b | 4b] [--repetitions 5] [--compare]

Work: 6 FLOPs a token for each parameter it passes through, and 6 n^2 x heads x head size a layer for the causal
attention of a rollout of n tokens; recomputation doesn't count. --compare adds the bare loop of benchmarks/update.py.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics

from update import SIZES, make_batch, measure

from megarl.parallel.environment import platform_name
from megarl.plan.devices import this_device
from megarl.plan.utilisation import update_flops


def main() -> None:
    """Measure in this process and print one row a loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.7b", choices=SIZES)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--compare", action="store_true", help="measure the bare loop too")
    options = parser.parse_args()
    if platform_name() != "cuda":
        raise SystemExit("benchmarks/gpu.py needs an NVIDIA GPU, and this machine shows none")
    device = this_device(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    size = SIZES[options.size]
    result = measure(size, 1, 1, options.repetitions, bare=options.compare)
    from megarl.parallel.world import leave_world

    leave_world()
    flops = update_flops(size.shape, make_batch(size).lengths_B.tolist())
    print(
        f"{device.name}, {result['dtype']}, {result['tokens']:,} tokens an update, peak {result['peak_bytes']:,} bytes"
    )
    print("| loop | seconds | tokens/s | MFU |\n|---|---|---|---|")
    for name, times in result["times_s"].items():
        seconds = statistics.median(times)
        mfu = flops / seconds / device.bf16_flops_per_s
        print(f"| {name} | {seconds:.3f} | {result['tokens'] / seconds:,.0f} | {mfu:.1%} |")


if __name__ == "__main__":
    main()
