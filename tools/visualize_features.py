"""Show the principal components of features; see diffbackbone/eval/visualize_features.py."""

from diffbackbone.eval.visualize_features import main

if __name__ == "__main__":
    main()
