"""Result files as a page for people."""
