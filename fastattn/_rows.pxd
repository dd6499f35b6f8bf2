# What the drivers of rows share: an array's axes with byte strides for each operand.
from fastattn._runtime cimport (FA_ROW_AXES, FA_ROW_GRAD, FA_ROW_MASK, FA_ROW_OPERANDS, FA_ROW_OUT, FA_ROW_X)

cdef enum:
    MOST_AXES = FA_ROW_AXES

cdef enum RowOperand:
    ROW_X = FA_ROW_X
    ROW_GRAD = FA_ROW_GRAD
    ROW_MASK = FA_ROW_MASK
    ROW_OUT = FA_ROW_OUT
    ROW_OPERANDS = FA_ROW_OPERANDS
