"""VMoBA: mixture-of-block attention on a video's token grid (arXiv 2506.23858)."""

from triskele.ops.vmoba.api import vmoba_attention, vmoba_select
from triskele.ops.vmoba.partition import VMoBAPartition, vmoba_partition

__all__ = ["VMoBAPartition", "vmoba_attention", "vmoba_partition", "vmoba_select"]
