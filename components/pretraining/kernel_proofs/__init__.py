"""What can be known about the CUDA path's kernels before a GPU runs them, and the checks that only a GPU can make."""
