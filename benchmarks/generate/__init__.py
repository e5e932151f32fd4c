"""`python -m benchmarks generate`: a decode step of Hugging Face generation and DeepSpeed."""
