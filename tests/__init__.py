"""Tests; the folders mirror gradl1_fast/."""
