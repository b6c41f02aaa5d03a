"""Train a diffusion U-Net on images without labels."""
