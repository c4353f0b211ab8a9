"""Checks for what would silently break double backprop."""
