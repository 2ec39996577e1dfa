"""What the modes are called, in flags, records and file names."""

MODE_EXCLUSIVE = "exclusive"
MODE_TIME_SLICING = "time-slicing"
MODE_MPS = "mps"
# To what puts modes in force a mode of its own: the daemon is started in another way.
MODE_MPS_PARTITIONS = "mps:partitions"
MODE_MIG = "mig"
MODE_CPU_DEMO = "cpu-demo"
MODES = (MODE_TIME_SLICING, MODE_MPS, MODE_MIG, MODE_EXCLUSIVE)
