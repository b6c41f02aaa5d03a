"""Classify images by their nearest neighbors in frozen features; see diffbackbone/eval/knn.py."""

from diffbackbone.eval.knn import main

if __name__ == "__main__":
    main()
