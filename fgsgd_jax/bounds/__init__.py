"""Floor 4, bounds: norms of groups and layers, certificates, and bounds of the generalization error."""

from ._certify import (
    Certificate as Certificate,
    Statement as Statement,
    Violation as Violation,
    certify as certify,
)
from ._conv_norms import ConvNorms as ConvNorms, conv_norms as conv_norms
from ._generalization import (
    GeneralizationBounds as GeneralizationBounds,
    LogBounds as LogBounds,
    Sample as Sample,
    generalization_bounds as generalization_bounds,
)
from ._geometry import ConvGeometry as ConvGeometry
from ._lipschitz import Chain as Chain, Sum as Sum, log_lipschitz as log_lipschitz
from ._norms import LayerNorms as LayerNorms, NormTable as NormTable, norms as norms
from ._unit_norms import Norms as Norms
