"""Reports of a plan: one document, written as HTML, Markdown, JSON and text."""
