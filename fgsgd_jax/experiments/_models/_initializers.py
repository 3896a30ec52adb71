from flax import nnx

# He et al. (2015), by fan-out: what ResNets are trained from.
conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

# Exponential average of the batch statistics, as in torch: each step moves them by a tenth.
BN_MOMENTUM = 0.9
BN_EPSILON = 1e-5

SE_REDUCTION = 16
