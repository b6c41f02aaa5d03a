"""Time whole training steps of UperNet and Mask R-CNN; see --help."""

from diffbackbone.benchmark.steps import main

if __name__ == "__main__":
    main()
