# shellcheck shell=bash
# Flags of XLA for each platform, the one place for them; the other scripts source this file and call
#
#     set_xla_flags tpu|gpu|cpu
#
# Flags that the environment already has come last and so win. A flag that the installed jaxlib does not know
# ends the program at its start with "Unknown flag": take it out here.

# Collectives asynchronous and fused, gradients reduced while the backward pass goes on. From MaxText's
# end_to_end/tpu scripts. They go to libtpu, which alone knows them: in XLA_FLAGS they would be unknown.
TPU_FLAGS=(
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
    --xla_tpu_overlap_compute_collective_tc=true
    --xla_enable_async_all_gather=true
)

# Collectives under computation (docs.jax.dev, GPU performance tips).
GPU_FLAGS=(
    --xla_gpu_enable_latency_hiding_scheduler=true
)

set_xla_flags() {
    case "$1" in
    tpu)
        export LIBTPU_INIT_ARGS="${TPU_FLAGS[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
        ;;
    gpu)
        export XLA_FLAGS="${GPU_FLAGS[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
        # What JAX takes of a GPU's memory at its start; NCCL and cuDNN need the rest.
        export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
        ;;
    cpu) ;;
    *)
        echo "platform '$1' is not known: choose tpu, gpu or cpu" >&2
        return 2
        ;;
    esac
}
