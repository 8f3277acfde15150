# shellcheck shell=bash
# Flags of XLA for each platform, the one place for them; the other scripts source this file and call
#
#     set_xla_flags tpu|gpu|cpu
#
# Flags that the environment already has come last and so win. A flag that the installed jaxlib does not know
# ends the program at its start with "Unknown flag": take it out here.

# FSDP's collectives under computation (docs.jax.dev, GPU performance tips; docs/scaling.md has what else it does).
GPU_FLAGS=(
    --xla_gpu_enable_latency_hiding_scheduler=true
)

set_xla_flags() {
    case "$1" in
    gpu)
        export XLA_FLAGS="${GPU_FLAGS[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
        # What JAX takes of a GPU's memory at its start; NCCL and cuDNN need the rest.
        export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
        ;;
    tpu | cpu) ;; # docs/scaling.md says which of libtpu's (LIBTPU_INIT_ARGS) may be worth a try
    *)
        echo "platform '$1' is not known: choose tpu, gpu or cpu" >&2
        return 2
        ;;
    esac
}
