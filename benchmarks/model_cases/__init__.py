"""What `benchmarks.model_kernels` times: one module a family of operations."""
