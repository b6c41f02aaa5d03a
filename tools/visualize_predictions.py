"""Draw a detector's predictions beside the truth."""

from diffbackbone.detectron2.visualize import main

if __name__ == "__main__":
    main()
