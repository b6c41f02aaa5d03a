"""Train and evaluate with Detectron2's Python configs."""

from diffbackbone.detectron2.lazyconfig_train_net import main

if __name__ == "__main__":
    main()
