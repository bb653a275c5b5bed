"""Records become statistics, tables, figures, and a page."""
