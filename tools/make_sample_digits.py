"""Make a small data set for classification, without a download."""

from diffbackbone.sample_data.digits import main

if __name__ == "__main__":
    main()
