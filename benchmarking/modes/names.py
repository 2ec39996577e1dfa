"""What the modes are called, in flags, records and file names."""

MODE_EXCLUSIVE = "exclusive"
MODE_TIME_SLICING = "time-slicing"
MODE_MPS = "mps"
MODE_MIG = "mig"
MODE_CPU_DEMO = "cpu-demo"
MODES = (MODE_TIME_SLICING, MODE_MPS, MODE_MIG, MODE_EXCLUSIVE)
