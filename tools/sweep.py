"""Find the block, timestep and pooling that suit a data set; see diffbackbone/eval/sweep.py."""

from diffbackbone.eval.sweep import main

if __name__ == "__main__":
    main()
