"""Training jobs: checked before anything is loaded, and started in as many processes as are asked for."""
