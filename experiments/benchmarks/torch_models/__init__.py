"""The models and their operators in plain PyTorch: oracles of the tests, and opponents of the benchmarks."""
