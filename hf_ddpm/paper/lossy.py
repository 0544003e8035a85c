r"""Progressive decoding of real images (Section 4.3): what is received by and by, and samples that agree with it."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from hf_ddpm.evaluation.nll import variational_bound
from hf_ddpm.evaluation.request import classes_for
from hf_ddpm.images import to_signed, to_unit
from hf_ddpm.options import option, require_at_least
from hf_ddpm.paper.pictures import rmse, sheet
from hf_ddpm.paper.study import Study, table
from hf_ddpm.seeds import FIGURES, generator
