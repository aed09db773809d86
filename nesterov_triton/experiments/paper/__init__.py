"""The experiments of the NesterovNODE paper (Nguyen et al., NeurIPS 2022), a file each with settings and networks."""

from nesterov_triton.experiments.experiment import Experiment, Measurement
from nesterov_triton.experiments.paper import point_cloud

EXPERIMENTS: dict[str, Experiment | Measurement] = {
    each.defaults.experiment: each for each in (point_cloud.EXPERIMENT,)
}
