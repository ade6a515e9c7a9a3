"""Every operator at the shapes of training, in one run: one table, one file, one plot.

    python -m benchmarks.bench_operators [--shapes base huge] [--dtype bfloat16] [--out FOLDER]

`of copy` is the share of the measured copy bandwidth that an operator reaches on its unique bytes; each module
bench_<operator> says which bytes these are. Exits with 1 if a result is wrong; wrong ones are not timed.
"""

from benchmarks import (
    bench_aggregate_neighbors,
    bench_embed_patches,
    bench_gather_tokens,
    bench_indexed_smooth_l1,
    bench_select_neighbors,
)
from benchmarks.harness import main

BENCHMARKS = (
    bench_gather_tokens,
    bench_embed_patches,
    bench_select_neighbors,
    bench_aggregate_neighbors,
    bench_indexed_smooth_l1,
)

if __name__ == "__main__":
    main(__doc__, "operators", *(benchmark.cases for benchmark in BENCHMARKS))
