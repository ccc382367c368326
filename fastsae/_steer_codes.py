"""What the integers in the tables of `ops.steer` mean; csrc/common/steer.h has the same numbers."""

END, CLAMP, MIN_CLAMP, CLAMP_IF_ACTIVE, SCALE, ADD, PROBE = range(7)  # opcodes
RAW, SIGNED, MEMBER = 1, 2, 4  # flags
NORMS = ("none", "layer_norm", "constant_norm")
