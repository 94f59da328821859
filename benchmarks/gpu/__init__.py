"""What runs on one NVIDIA GPU: tests, kernels, solvers, a step, streaming, a trained pair. See docs/gpu.md."""
