//! Vectors that NCCL works on where burn has them.

use burn::backend::Cube;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl::cuda::CudaRuntime;
use cubecl_runtime::runtime::Runtime;
use cubecl_runtime::server::ServerStorage;
use cubecl_runtime::storage::{ComputeStorage, ManagedResource};
use repa_comm::nccl::{After, DevicePending, DeviceType, DeviceValues};
use repa_comm::{Background, CommError, Nccl, Wire};

use crate::Device;

/// A collective on a tensor's own memory.
pub(super) struct OverNccl {
    /// What the result will be in.
    values: Tensor<1>,
    pending: Result<DevicePending, CommError>,
    /// Keeps the memory, and keeps it where it is: CubeCL moves what has a handle only to other pages when it needs room,
    /// and knows nothing of NCCL's streams.
    _memory: Resource,
}

impl OverNccl {
    /// Starts it on the device after all that is in burn's queue. All ranks have to go this way or none, so what is no
    /// plain vector in the GPU's memory, and a GPU that has failed, panic, which ends all ranks.
    pub(super) fn start(values: Tensor<1>, how: Background, device: &Device, nccl: &Nccl) -> Self {
        let half = how.wire == Wire::Bf16 && how.phases.reduces();
        let values = if half { values.cast(DType::BF16) } else { values };
        let len = values.dims()[0];
        let fusion = values.clone().try_into_primitive::<Cube>().expect("a tensor on the GPU");
        let client = fusion.client.clone();
        // All that the values follow from goes into CubeCL's stream here.
        let memory = client.resolve_tensor_float::<CubeBackend>(fusion);
        assert!(len < 2 || memory.meta.strides()[..] == [1], "buckets are contiguous");
        let resource = memory.client.get_resource::<Server>(memory.handle.clone());
        let resource = resource.unwrap_or_else(|error| panic!("the GPU has failed: {error}"));
        let kind = if half { DeviceType::Bf16 } else { DeviceType::F32 };
        let on_device = DeviceValues { start: resource.resource().ptr, len, kind };
        let after = match nccl.marks_contexts() {
            true => After::Context,
            false => {
                // An error of the device shows again where its results are read.
                let _ = device.sync();
                After::Nothing
            }
        };
        // SAFETY: the memory is kept until the end of the operation, in `wait` or by a drop that nobody survives: what
        // has failed to be waited for ends the job. Nobody else uses it: buckets of gradients have memory of their own
        // (`Collector::bucket`), and those of weights are asked for only when they have arrived.
        let pending = unsafe { nccl.start_device(on_device, how.phases, Some(how.bucket), after) };
        Self { values, pending, _memory: resource }
    }

    /// Waits for the result.
    ///
    /// # Errors
    /// NCCL's, or the driver's.
    pub(super) fn wait(self) -> Result<Tensor<1>, CommError> {
        self.pending?.wait()?;
        Ok(self.values.cast(DType::F32))
    }
}

type Server = <CudaRuntime as Runtime>::Server;
type Resource = ManagedResource<<<Server as ServerStorage>::Storage as ComputeStorage>::Resource>;
