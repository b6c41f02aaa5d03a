"""Train and evaluate with Detectron2's YAML configs."""

from diffbackbone.detectron2.train_net import main

if __name__ == "__main__":
    main()
