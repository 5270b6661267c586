"""Attention alone on one CPU thread, float32, 12 heads of 64: exact (SDPA) against Monarch, both through Inductor.

python benchmarks/cpu_attention.py [--long] [--json benchmarks/results/cpu_attention.json]
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from monarch_compile.tools.cli import add_benchmark_arguments
from monarch_compile.tools.timing import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_benchmark_arguments(parser)
    arguments = parser.parse_args()
    run(seq_lens=arguments.seq_lens, long=arguments.long, seconds=arguments.seconds, json_path=arguments.json)
