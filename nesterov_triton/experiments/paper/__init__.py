"""The experiments of the NesterovNODE paper (Nguyen et al., NeurIPS 2022), a file each with settings and networks."""

from nesterov_triton.experiments.experiment import Experiment, Measurement
from nesterov_triton.experiments.paper import cifar10, mnist, point_cloud, silverbox, walker2d

EXPERIMENTS: dict[str, Experiment | Measurement] = {
    module.EXPERIMENT.defaults.experiment: module.EXPERIMENT
    for module in (point_cloud, mnist, cifar10, walker2d, silverbox)
}
