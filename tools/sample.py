"""Generate images with a guided-diffusion U-Net; see diffbackbone/pretrain/sample.py."""

from diffbackbone.pretrain.sample import main

if __name__ == "__main__":
    main()
