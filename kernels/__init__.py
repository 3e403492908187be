"""Image geometry and resize kernels. Nothing here imports the rest of the sidecar."""
