"""The machine and the version of core: devices, process groups, files, processes, what core lacks on a CPU."""
