"""The fastest measured settings for a configuration on this machine."""
