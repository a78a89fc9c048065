"""The same transformer blocks with fewer kernels and less memory. Nothing here changes a result."""
