"""The launchers of NetsPresso Trainer 1.4.1, quoted, around a stand-in for the rest of it.

trainer_main.py, evaluator_main.py and utils/engine_utils.py are its own; registry, models and training are ours.
"""

from netspresso_trainer.evaluator_main import evaluation_cli
from netspresso_trainer.inferencer_main import inference_cli
from netspresso_trainer.trainer_main import train_cli, train_with_yaml

__all__ = ["evaluation_cli", "inference_cli", "train_cli", "train_with_yaml"]
__version__ = "1.4.1"
