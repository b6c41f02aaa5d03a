"""Print a U-Net's blocks with what each costs: which block can I afford?"""

from diffbackbone.inspect_unet import main

if __name__ == "__main__":
    main()
