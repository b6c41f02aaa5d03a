"""Write a backbone as a program that runs without this package, or a U-Net's weights alone."""

from diffbackbone.export import main

if __name__ == "__main__":
    main()
