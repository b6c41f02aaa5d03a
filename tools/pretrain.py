"""Train a guided-diffusion U-Net on a folder of images without labels."""

from diffbackbone.pretrain.training import main

if __name__ == "__main__":
    main()
