"""Result files as a page for people, or as Markdown."""
