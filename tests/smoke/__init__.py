"""Every program once, on tiny inputs."""
