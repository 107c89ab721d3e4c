"""What a run writes and starts from: its directory, record and network card."""
