"""What `evaluate` measures, one function a probe."""
