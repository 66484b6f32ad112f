"""The benchmarks behind ``python jobs/benchmark.py``, a module for each subcommand."""
