"""Actors and services: replicas that are routed to, watched, restarted and scaled.

    policy          what is done about a failure, per failure unit
    health          tells dead, frozen and hanging processes from busy ones
    evidence        what the kernel says of a process

Importing this package, or `policy`, loads nothing heavy.
"""
