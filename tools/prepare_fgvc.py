"""Sort a fine-grained data set into class folders; see diffbackbone/eval/fgvc.py."""

from diffbackbone.eval.fgvc import main

if __name__ == "__main__":
    main()
