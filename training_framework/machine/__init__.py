"""What this machine is and can do, and the process on it: devices, memory, randomness, groups."""
