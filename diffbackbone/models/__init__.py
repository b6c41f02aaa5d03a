"""Diffusion networks behind one interface: numbered blocks, one traversal, taps."""
