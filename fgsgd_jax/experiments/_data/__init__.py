"""Image classification sets, in memory as unsigned bytes."""

from ._images import ImageSet as ImageSet, Split as Split, check as check, data_difference as data_difference
from ._load import load as load
from ._subset import balanced_order as balanced_order, hold_out as hold_out, limit as limit
