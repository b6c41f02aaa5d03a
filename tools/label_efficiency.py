"""Compare pretrained and random features of a frozen U-Net with few labels, over many tasks."""

from diffbackbone.eval.label_efficiency import main

if __name__ == "__main__":
    main()
