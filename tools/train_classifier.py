"""Train and evaluate a classification head on the features of a diffusion U-Net."""

from diffbackbone.eval.classify import main

if __name__ == "__main__":
    main()
