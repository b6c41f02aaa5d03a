"""Fine-tune and evaluate UperNet by Hugging Face transformers on a folder of images and masks."""

from diffbackbone.hf_segmentation import main

if __name__ == "__main__":
    main()
