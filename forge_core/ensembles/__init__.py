"""Ensembles of weak verifiers: one probability of being right from the scores of many that err.

After Weaver (J. Saad-Falcon et al., 2025, "Shrinking the Generation-Verification Gap with Weak Verifiers"): scores are
normalised and made votes (`scales`), verifiers that share their errors are found and read as one (`dependence`), how
good each is follows without labels from a model with a hidden truth (`label_model`), those that tell nothing are
dropped (`fit`), and the others give each sample a probability (`posterior`), which can be a reward (`reward`).
"""
