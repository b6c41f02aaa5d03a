"""Evaluation of frozen features: kNN, linear probes, CKA, sweeps, pictures and classifiers."""
