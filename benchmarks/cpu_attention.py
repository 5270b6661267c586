"""Attention alone on one CPU thread, float32, 12 heads of 64: exact (SDPA) against Monarch, both through Inductor.

python benchmarks/cpu_attention.py [--long] [--json benchmarks/results/cpu_attention.json]
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from monarch_compile.attention.commands import add_bench_arguments, bench

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_bench_arguments(parser)
    bench(parser.parse_args())
