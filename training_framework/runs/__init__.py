"""What a run leaves and starts from: its directory, record and network card."""
