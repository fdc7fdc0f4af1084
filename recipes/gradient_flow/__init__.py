"""How signals and gradients go through deep networks before any training: the two classic studies.

``initializations`` puts seven initializations in front of three activations on a 20-layer network; ``depths`` makes the
network ever deeper. ``python -m recipes.gradient_flow`` runs both on a batch of handwritten digits.
``gradient_through_time``, which ``python -m recipes.lstm`` calls, follows the gradient of recurrent networks back from
the last time step to the first.

References:
    Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks (2010), AISTATS.
    He, Zhang, Ren, Sun: Delving deep into rectifiers (2015), arXiv 1502.01852.
    Saxe, McClelland, Ganguli: Exact solutions to the nonlinear dynamics of learning in deep linear neural networks
    (2013), arXiv 1312.6120.
    Mishkin, Matas: All you need is a good init (2015), arXiv 1511.06422.
"""

from recipes.gradient_flow._digits import digits_batches
from recipes.gradient_flow._figures import draw_depths, draw_initializations
from recipes.gradient_flow._measurement import Measurement, measure
from recipes.gradient_flow._network import ACTIVATIONS, ActivationName, network
from recipes.gradient_flow._records import records, write_records
from recipes.gradient_flow._study import Observation, Setting, observe, settings
from recipes.gradient_flow._summary import Summary, summarize
from recipes.gradient_flow._tables import depth_sheets, initialization_sheet
from recipes.gradient_flow._tensorboard import write_tensorboard
from recipes.gradient_flow._through_time import gradient_through_time
from recipes.gradient_flow._verdict import RULE, Verdict, verdict

__all__ = [
    "ACTIVATIONS",
    "RULE",
    "ActivationName",
    "Measurement",
    "Observation",
    "Setting",
    "Summary",
    "Verdict",
    "depth_sheets",
    "digits_batches",
    "draw_depths",
    "draw_initializations",
    "gradient_through_time",
    "initialization_sheet",
    "measure",
    "network",
    "observe",
    "records",
    "settings",
    "summarize",
    "verdict",
    "write_records",
    "write_tensorboard",
]
