"""Checks on the user's own setup that a stopped and resumed run ends like an uninterrupted one."""
