"""How good answers are: benchmarks and comparisons, over the daemon or any OpenAI address."""
