"""Draw a segmenter's predictions: images, truth and prediction side by side."""

from diffbackbone.openmmlab.visualize import main

if __name__ == "__main__":
    main()
