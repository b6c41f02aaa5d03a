"""Train with MMSegmentation's own script and options."""

from diffbackbone.openmmlab.commands import train

if __name__ == "__main__":
    train()
