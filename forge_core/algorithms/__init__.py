"""Algorithms: what a researcher reads and changes; no infrastructure here."""
