"""Image geometry and resize kernels. This package imports nothing else of the sidecar."""
