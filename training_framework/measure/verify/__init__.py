"""Proof on the user's own setup: a run that is stopped and resumed ends as one that was not."""
