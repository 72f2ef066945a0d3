"""NetsPresso Trainer's `netspresso-train` with effformer's backbone, on one GPU or several.

    python netspresso_train.py --data data.yaml --augmentation augmentation.yaml --model model.yaml \
        --training training.yaml --logging logging.yaml --environment environment.yaml --gpus 0,1

The options are the trainer's. `model.architecture.backbone.name` of model.yaml stays `efficientformer`.
"""

from netspresso_trainer import train_cli

import effformer.netspresso

if __name__ == "__main__":
    effformer.netspresso.register()
    train_cli()
