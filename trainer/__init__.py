import logging
import warnings

# Said at import, for every rank, and of no use to who trains: megatron-core misses optional packages, torch renames its
# own functions.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
# Every rank would say it; the run's own first line names the device.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
