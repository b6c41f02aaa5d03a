"""Accuracy of guided-diffusion's classifiers; see diffbackbone/eval/evaluate_classifier.py."""

from diffbackbone.eval.evaluate_classifier import main

if __name__ == "__main__":
    main()
