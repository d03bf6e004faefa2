//! Work that is done to its end whoever stops waiting for it.

use crate::error::Error;

/// The result of a task that is never aborted: a panic in it goes on here.
pub(crate) async fn joined<T>(task: tokio::task::JoinHandle<Result<T, Error>>) -> Result<T, Error> {
    match task.await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being shut down; nobody is left to see what is returned.
            Err(error) => Err(Error::HypervisorBroken {
                detail: error.to_string(),
            }),
        },
    }
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    joined(tokio::task::spawn_blocking(work)).await
}
