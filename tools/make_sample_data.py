"""Make a small data set for segmentation and detection, without a download."""

from diffbackbone.sample_data.dataset import main

if __name__ == "__main__":
    main()
