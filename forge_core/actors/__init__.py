"""Actors: the processes of a run's meshes. Each owns its engine, its clock and its view of the store.

Episodes, tokens and weights pass between actors through the store and TorchStore; what an endpoint takes and
gives back is small.
"""
