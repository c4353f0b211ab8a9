"""What `make docs` does besides MkDocs: formulas, links to files outside docs/, figures, docstrings."""
