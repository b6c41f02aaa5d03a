"""Evaluate with MMSegmentation's own script and options."""

from diffbackbone.openmmlab.commands import evaluate

if __name__ == "__main__":
    evaluate()
