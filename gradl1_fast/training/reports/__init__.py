"""What the commands report: each module turns one kind of results into a page, and into lines to print."""
