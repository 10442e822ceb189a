"""`make gpu`: the tests that need a GPU, the benchmarks, and the tables of docs/gpu.md."""
