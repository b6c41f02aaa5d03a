"""Draw a segmentor's predictions: images, truth and prediction side by side in one picture.

For instance ``python tools/mmseg_visualize.py upernet_difffeed_sample.py iter_400.pth``.
"""

from diffbackbone.openmmlab.visualize import main

if __name__ == "__main__":
    main()
