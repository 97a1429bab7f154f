//! Vectors on the device on their way between the ranks: over NCCL from GPU to GPU, else by way of the host's memory.

use burn::tensor::{Tensor, TensorData};
use repa_comm::{Background, CommError, Communicator, Pending};

#[cfg(feature = "cuda")]
use super::over_nccl::OverNccl;
use super::read;
use crate::Device;

/// A collective that has been started.
pub(super) enum Travelling {
    /// One rank alone: nothing has to travel.
    Here(Tensor<1>),
    /// By way of the host's memory, and where it comes back to.
    Host(Pending<Vec<f32>>, Device),
    #[cfg(feature = "cuda")]
    Nccl(Box<OverNccl>),
}

/// Starts a collective on a bucket, and returns as soon as the values are where they start from: on the host, that is
/// when they are computed.
pub(super) fn start(
    values: Tensor<1>,
    how: Background,
    device: &Device,
    comm: &dyn Communicator,
) -> Travelling {
    if comm.size() == 1 {
        return Travelling::Here(values);
    }
    #[cfg(feature = "cuda")]
    if let Some(nccl) = comm.nccl() {
        return Travelling::Nccl(Box::new(OverNccl::start(values, how, device, nccl)));
    }
    Travelling::Host(comm.start_f32(read(values), how), device.clone())
}

impl Travelling {
    /// Waits for the result.
    ///
    /// # Errors
    /// Those of the collective.
    pub(super) fn wait(self) -> Result<Tensor<1>, CommError> {
        match self {
            Self::Here(values) => Ok(values),
            Self::Host(pending, device) => {
                let values = pending.wait()?;
                let len = values.len();
                Ok(Tensor::from_data(TensorData::new(values, [len]), &device))
            }
            #[cfg(feature = "cuda")]
            Self::Nccl(started) => started.wait(),
        }
    }
}
