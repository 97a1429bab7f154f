//! Which communicator sums the gradients: MPI's, or NCCL's on top of it.

use std::sync::Arc;

use repa_comm::{Communicator, RemoteError};

#[cfg(feature = "cuda")]
use super::TrainError;
use super::agree;
use crate::config::{Backend, Config, ConfigError};

/// The communicator that `comm.backend` and `device` ask for, over the one that the job started with. Called by all
/// ranks.
///
/// # Errors
/// NCCL is asked for and cannot be had.
pub fn communicator(
    config: &Config,
    comm: Arc<dyn Communicator>,
) -> Result<Arc<dyn Communicator>, RemoteError> {
    let on_gpus = config.device.is_cuda();
    let wanted = match config.comm.backend {
        Backend::Mpi => false,
        Backend::Auto => on_gpus && comm.size() > 1,
        Backend::Nccl => true,
    };
    if !wanted {
        return Ok(comm);
    }
    if !on_gpus {
        let problem = "NCCL sums on GPUs: set device=cuda, or comm.backend=auto";
        return agree(comm.as_ref(), Err(ConfigError::value("comm.backend", "nccl", problem).into()));
    }
    nccl(config, comm)
}

#[cfg(feature = "cuda")]
fn nccl(config: &Config, comm: Arc<dyn Communicator>) -> Result<Arc<dyn Communicator>, RemoteError> {
    use repa_comm::{Failure, ReduceOp, all_or_first_error, nccl};
    if config.comm.backend == Backend::Auto {
        // All ranks or none; where one cannot, rank 0 says why it could not, if it could not.
        let available = nccl::available();
        let mut can = [i64::from(available.is_ok())];
        let agreed = comm.all_reduce_i64(&mut can, ReduceOp::Min).map_err(TrainError::from);
        agree(comm.as_ref(), agreed)?;
        if can[0] == 0 {
            let why = available.err().map_or_else(|| "another rank lacks it".to_owned(), |e| e.to_string());
            if comm.rank() == 0 {
                tracing::warn!("gradients are summed over MPI, through the host's memory: {why}");
            }
            return Ok(comm);
        }
    }
    let ordinal = super::session::cuda_ordinal(&config.device.0, comm.local_rank());
    let deadline = super::deadline(config);
    match nccl::Nccl::start(Arc::clone(&comm), ordinal, Some(deadline)) {
        Ok(started) => Ok(Arc::new(started)),
        // What can be known before NCCL starts is the same on all ranks; anything else ends the job.
        Err(error @ repa_comm::CommError::Start(_)) => {
            let failure =
                Failure { message: error.to_string(), code: i32::from(crate::exit::Kind::Usage.code()) };
            all_or_first_error(comm.as_ref(), Err(failure))
        }
        Err(error) => repa_comm::abort(i32::from(crate::exit::Kind::Runtime.code()), &error.to_string()),
    }
}

#[cfg(not(feature = "cuda"))]
fn nccl(_config: &Config, comm: Arc<dyn Communicator>) -> Result<Arc<dyn Communicator>, RemoteError> {
    // `device` refuses a build without CUDA before anything is summed.
    Ok(comm)
}
