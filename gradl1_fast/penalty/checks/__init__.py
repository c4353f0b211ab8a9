"""Checks for conditions that would silently break double backprop."""
