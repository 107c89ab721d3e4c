"""This machine and the processes on it: devices, memory, load, randomness, process groups."""
