"""Compare networks on labeled images; see diffbackbone/eval/compare.py."""

from diffbackbone.eval.compare import main

if __name__ == "__main__":
    main()
