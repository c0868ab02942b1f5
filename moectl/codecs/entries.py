"""What a codeword stands for, in 64 bits, so that one load decodes it.

An entry says where the weights other than zero are, not what each weight is: a phrase of a sparse matrix is long and
has few of them. Byte 0 is the number of weights. Bytes 1 to 6 are the offsets of those that are not zero, in rising
order, 255 where there is no more. Bit `i` of byte 7 is set where the one at byte 1 + i is +, and not where it is -.
"""

from __future__ import annotations

CODES = 1 << 16
SLOTS = 6
UNUSED = 255
"""The offset of an empty slot, and so also how many weights a codeword can stand for at most."""

EMPTY = 0x00FF_FFFF_FFFF_FF00
"""The entry of a string without weights; a codeword that is not used has 0."""
