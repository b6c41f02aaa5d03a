"""Time our backbone side by side with published code; see --help."""

from diffbackbone.benchmark.timing import main

if __name__ == "__main__":
    main()
