"""Where workers run: in this process, or one process for each rank."""
