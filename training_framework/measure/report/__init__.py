"""Shows result files as an HTML page or as Markdown."""
